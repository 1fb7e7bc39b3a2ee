"""The CUDA library on a GPU: graphs, waiting, streams, another device, large tensors."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import chains, step
from cuda_graphs import check_step_captured
from support import gpu, ref

import fastkd

pytestmark = [pytest.mark.usefixtures("one_thread")]


@gpu
@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss", "relu_tap"])
def test_a_step_is_captured_in_a_cuda_graph(cuda, function):
    check_step_captured(function)


@gpu
def test_no_call_waits_for_the_device(cuda):
    s, t = chains(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(s, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_two_streams_do_not_share_their_tickets(cuda):
    pairs = [chains(cuda) for _ in range(2)]
    want = [step(*pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, pair in zip(streams, pairs):
            with torch.cuda.stream(stream):
                got.append(step(*pair))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for g, w in zip(got, want) for a, b in zip(g, w))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves(cuda):
    s, t = (
        [torch.randn(4, c, 9, 9, device="cuda:1", requires_grad=True) for c in (16, 24)] for _ in range(2)
    )
    with torch.cuda.device(0):
        got = torch.autograd.grad(fastkd.attention_transfer_loss(s, t) + fastkd.fsp_loss(s, t), s)
    want = torch.autograd.grad(ref.attention_transfer_loss(s, t) + ref.fsp_loss(s, t), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(cuda, layout):
    n, c, size = 172, 4096, 56
    x = torch.randn(n, c, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    assert x.numel() > 2**31
    x.requires_grad_()
    t = torch.randn(n, 8, size, size, device="cuda")
    (grad,) = torch.autograd.grad(fastkd.attention_transfer_loss(x, t, weight=1e6), x)
    for i in (0, n - 1):
        part = x[i : i + 1].detach().float().requires_grad_()
        (want,) = torch.autograd.grad(ref.attention_transfer_loss(part, t[i : i + 1], weight=1e6 / n), part)
        torch.testing.assert_close(
            grad[i : i + 1].float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item()
        )
