"""CRD on a GPU: graphs, waiting, another device, rows that are none, offsets beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from crd_cases import case, unit
from cuda_graphs import check_captured
from support import gpu, missing

import fastkd

pytestmark = [pytest.mark.skipif(bool(missing("triton")), reason=missing("triton"))]
PLACED = "cuda"


def placed(tensors, dtype=torch.float32, device=PLACED):
    return [x.to(device, dtype if x.is_floating_point() else None) for x in tensors]


def step_of(tensors, **options):
    student, teacher = (x.requires_grad_() for x in tensors[:2])

    def step():
        loss, normalizers = fastkd.crd_loss(student, teacher, *tensors[2:], **options)
        return [loss, normalizers, *torch.autograd.grad(loss, (student, teacher))]

    return step


@gpu
@pytest.mark.parametrize("known", [True, False])
def test_a_step_is_captured_in_a_cuda_graph(known):
    """New embeddings and banks, and in the second case normalizers that each replay finds anew."""
    tensors = placed(case(8, 3000, size=5000, width=128))
    normalizers = torch.full((2,), 5000.0 if known else 0.0, device=PLACED)
    with torch.no_grad():
        for x in tensors[:4]:
            x.mul_(0.5)  # normal numbers, which the check fills in, are no unit vectors
    with fastkd.use_backend("triton"):
        check_captured(step_of(tensors, normalizers=normalizers, temperature=10.0), tensors[:4])


@gpu
def test_no_call_waits_for_the_device():
    """Loss, gradient, the change of the banks, and the drawing of negatives within an epoch."""
    tensors = placed(case(8, 300, size=500, width=64))
    module = fastkd.CRD(*tensors[2:4])
    index = torch.arange(8, device=PLACED)
    steps = [step_of(tensors), step_of(tensors, normalizers=(500.0, 400.0))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            for step in steps:
                step()
            loss, normalizers = module(tensors[0], tensors[1], tensors[4])
            loss.backward()
            module.update(index, tensors[0].detach(), tensors[1].detach(), normalizers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_auto_serves_a_gpu_by_triton_with_the_same_bits_in_each_run():
    tensors = placed(case(16, 4000, size=9000, width=100))
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older than sm_80")
    step = step_of(tensors)
    first = step()
    with fastkd.use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    with fastkd.use_backend("reference"):
        torch.testing.assert_close(step(), first, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_runs_the_kernels(mode, launched):
    """The operator in the graph chooses when it runs."""
    torch.compiler.reset()
    tensors = placed(case(8, 900, size=2000, width=64))
    student = tensors[0].requires_grad_()
    compiled = torch.compile(lambda x: fastkd.crd_loss(x * 1, *tensors[1:])[0], fullgraph=True, mode=mode)
    with fastkd.use_backend("reference"):
        (wanted,) = torch.autograd.grad(fastkd.crd_loss(*tensors)[0], student)
    for _ in range(4):
        (found,) = torch.autograd.grad(compiled(student), student)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert "crd_loss_kernel" in launched


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves():
    tensors = placed(case(4, 90, size=70, width=24), device="cuda:1")
    with fastkd.use_backend("triton"), torch.cuda.device(0):
        found = step_of(tensors)()
    with fastkd.use_backend("reference"):
        torch.testing.assert_close(found, step_of(tensors)(), rtol=1e-4, atol=1e-5)


@gpu
def test_a_row_outside_the_banks_is_nan_and_no_fault():
    *vectors, rows = placed(case(4, 90, size=70, width=24))
    rows[2, 50] = 10**12
    with fastkd.use_backend("triton"):
        loss, _ = fastkd.crd_loss(*vectors, rows)
    assert loss.isnan()


@gpu
@pytest.mark.large
@pytest.mark.parametrize(
    ("size", "count", "k", "width"),
    [(17_000_000, 3, 500, 128), (1000, 131_200, 16_384, 16)],
    ids=["numbers of a bank", "draws"],
)
def test_more_than_two_to_the_31(size, count, k, width):
    bank = unit(torch.randn(1000, width, device=PLACED)).to(torch.bfloat16).repeat(size // 1000, 1)
    assert max(bank.numel(), count * (k + 1)) > 2**31
    x = unit(torch.randn(count, width, device=PLACED)).requires_grad_()
    rows = torch.randint(size - 900, size, (count, k + 1), device=PLACED)
    z, noise = 1e3 * size, k / size
    with fastkd.use_backend("triton"):
        loss, _ = fastkd.crd_loss(x, x.detach(), bank, bank, rows, normalizers=(z, z))
        (grad,) = torch.autograd.grad(loss * count, x)
    for i in (0, count - 1):
        mine = x[i].detach().double().requires_grad_()
        odds = (bank[rows[i]].double() @ mine / 0.07).exp() / z
        wanted = (odds[0] / (odds[0] + noise + 1e-7)).log() - ((odds[1:] + 1e-7) / noise).log1p().sum()
        (exact,) = torch.autograd.grad(-wanted, mine)
        torch.testing.assert_close(grad[i].double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
