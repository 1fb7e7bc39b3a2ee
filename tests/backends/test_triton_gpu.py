"""Triton's operations on a GPU: graphs, waiting, another device, large tensors."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import check_step_captured
from support import gpu, missing, ref

import fastkd

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]


@gpu
@pytest.mark.parametrize("function", ["attention_transfer_loss", "relu_tap"])
def test_a_step_is_captured_in_a_cuda_graph(function):
    with fastkd.use_backend("triton"):
        check_step_captured(function)


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_runs_the_operators(mode):
    torch.compiler.reset()
    s, t = ([torch.randn(4, c, n, n, device="cuda") for c, n in ((16, 32), (64, 7))] for _ in range(2))
    s = [x.requires_grad_() for x in s]
    compiled = torch.compile(
        lambda s, t: fastkd.attention_transfer_loss([fastkd.relu_tap(x)[0] for x in s], t),
        fullgraph=True,
        mode=mode,
    )
    want = torch.autograd.grad(ref.attention_transfer_loss([x.relu() for x in s], t), s)
    with fastkd.use_backend("triton"):
        for _ in range(4):
            got = torch.autograd.grad(compiled(s, t), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


@gpu
def test_no_call_waits_for_the_device():
    s, t = ([torch.randn(4, c, n, n, device="cuda") for c, n in ((16, 32), (64, 7))] for _ in range(2))
    s = [x.requires_grad_() for x in s]
    with fastkd.use_backend("triton"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                fastkd.attention_transfer_loss(s, t, weight=1000.0).backward()
                sum(v.sum() for x in s for v in fastkd.relu_tap(x)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves():
    x, y = (torch.randn(4, 16, 9, 9, device="cuda:1", requires_grad=True) for _ in range(2))
    with fastkd.use_backend("triton"), torch.cuda.device(0):
        got = torch.autograd.grad(
            fastkd.attention_transfer_loss(x, y) + fastkd.relu_tap(x, y)[1].sum(), (x, y)
        )
    want = torch.autograd.grad(ref.attention_transfer_loss(x, y) + ref.relu_tap(x, y)[1].sum(), (x, y))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "swapped"])
def test_more_than_two_to_the_31_elements(layout):
    n, c, size = 172, 4096, 56
    x = torch.randn(
        c if layout == "swapped" else n,
        n if layout == "swapped" else c,
        size,
        size,
        device="cuda",
        dtype=torch.bfloat16,
    )
    x = x.transpose(0, 1) if layout == "swapped" else x
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    assert x.numel() > 2**31
    x.requires_grad_()
    t = torch.randn(n, 8, size, size, device="cuda")
    with fastkd.use_backend("triton"):
        (grad,) = torch.autograd.grad(fastkd.attention_transfer_loss(x, t, weight=1e6), x)
    for i in (0, n - 1):
        part = x[i : i + 1].detach().float().requires_grad_()
        (want,) = torch.autograd.grad(ref.attention_transfer_loss(part, t[i : i + 1], weight=1e6 / n), part)
        torch.testing.assert_close(
            grad[i : i + 1].float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item()
        )
