"""RKD's Triton kernels on a GPU: graphs, waiting, another device, offsets beyond 2^31, repeated bits."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import check_captured
from support import gpu, missing

import fastkd
from fastkd import reference

pytestmark = [pytest.mark.skipif(bool(missing("triton")), reason=missing("triton"))]


def step_of(student, teacher):
    student.requires_grad_()

    def step():
        loss = fastkd.rkd_loss(student, teacher)
        return [loss, *torch.autograd.grad(loss, student)]

    return step


def pair(count=64, widths=(64, 100), dtype=torch.float32, device="cuda"):
    return [torch.randn(count, width, device=device).to(dtype) for width in widths]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_captured_in_a_cuda_graph(dtype):
    tensors = pair(dtype=dtype)
    with fastkd.use_backend("triton"):
        check_captured(step_of(*tensors), tensors)


@gpu
def test_no_call_waits_for_the_device():
    step = step_of(*pair())
    with fastkd.use_backend("triton"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize(
    ("shape", "launches"),
    [
        ((64, 64, 64), "pairs triples gradient"),
        ((256, 512, 512), "pairs triples gradient"),
        ((700, 100, 3), "pairs sums triples gradient"),
        ((700, 512, 600), "pairs sums triples sums gradient"),
    ],
    ids=str,
)
def test_auto_serves_a_gpu_by_triton_with_the_same_bits_in_each_run(launched, shape, launches):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older than sm_80")
    step = step_of(*pair(shape[0], shape[1:]))
    first = step()
    assert launched == [f"rkd_{name}_kernel" for name in launches.split()]
    with fastkd.use_backend("triton"):
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    launched.clear()
    with fastkd.use_backend("reference"):
        torch.testing.assert_close(step(), first, rtol=1e-4, atol=1e-5)
    assert not launched


@gpu
@pytest.mark.unpoisoned
def test_a_compiled_step_runs_the_kernels():
    torch.compiler.reset()
    student, teacher = pair()
    student.requires_grad_()
    compiled = torch.compile(lambda s, t: fastkd.rkd_loss(2 * s, t), fullgraph=True)
    for _ in range(3):
        (found,) = torch.autograd.grad(compiled(student, teacher), student)
    (wanted,) = torch.autograd.grad(reference.rkd_loss(2 * student.double(), teacher.double()), student)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves():
    tensors = pair(device="cuda:1")
    with fastkd.use_backend("triton"), torch.cuda.device(0):
        found = step_of(*tensors)()
    with fastkd.use_backend("reference"):
        torch.testing.assert_close(found, step_of(*tensors)(), rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.large
def test_more_than_two_to_the_31_numbers():
    """Of the student, in either order of its dimensions: its last numbers alone are not equal."""
    count, width = 64, 2**25 + 8
    teacher = torch.randn(count, 5, device="cuda")
    part = torch.randn(count, 16, device="cuda", dtype=torch.bfloat16)
    wanted = part.float().requires_grad_()
    (exact,) = torch.autograd.grad(reference.rkd_loss(wanted, teacher), wanted)
    for columns_first in (False, True):
        student = torch.zeros(
            (width, count) if columns_first else (count, width), device="cuda", dtype=part.dtype
        )
        student = student.T if columns_first else student
        assert student.numel() > 2**31
        student[:, -16:] = part
        student.requires_grad_()
        with fastkd.use_backend("triton"):
            (grad,) = torch.autograd.grad(fastkd.rkd_loss(student, teacher), student)
        torch.testing.assert_close(
            grad[:, -16:].float(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item()
        )
        assert not grad[:, :-16].any()
        del student, grad
