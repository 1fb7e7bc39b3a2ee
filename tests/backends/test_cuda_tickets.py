"""Ticket counters of the CUDA library, with several streams, captured graphs and memory pools."""

from __future__ import annotations

import emulated
import pytest
import torch
from cuda_cases import chains
from support import gpu

import fastkd
from fastkd import native

pytestmark = [pytest.mark.usefixtures("one_thread")]

CALLS = {
    "attention_map": lambda s, t: fastkd.attention_map(s[0]).square().sum(),
    "attention_transfer_loss": fastkd.attention_transfer_loss,
    "fsp_loss": fastkd.fsp_loss,
    "relu_tap": lambda s, t: sum(y.square().sum() for y in fastkd.relu_tap(s[0], t[0])),
}


def step(call, s, t):
    loss = CALLS[call](s, t)
    # without its history: while that lives, a gradient of a later step is waited for on the stream of this
    # one, which makes a capture on another stream fail
    return [loss.detach(), *torch.autograd.grad(loss, s, allow_unused=True)]


def equal(got, want):
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not native.EMULATED, reason="a GPU does not say which counters a call has")
@pytest.mark.parametrize("call", CALLS)
def test_a_captured_call_has_counters_of_its_own(cuda, call):
    """So its graph clears none when it is replayed, and may be replayed beside others."""
    s, t = chains(cuda)
    want = step(call, s, t)
    taken = []
    with emulated.stream(0, capturing=True):
        for _ in range(3):
            assert equal(step(call, s, t), want)
            taken.append(emulated.tickets())
    assert taken == sorted(set(taken)) and taken[0] >= 64
    with emulated.stream(0):
        assert equal(step(call, s, t), want) and emulated.tickets() < 64


@pytest.mark.skipif(not native.EMULATED, reason="a GPU does not say which counters a call has")
def test_captured_calls_clear_memory_of_their_own_once_no_counters_are_left(cuda):
    x = cuda(torch.ones(1 << 20, 1, 1))
    with emulated.stream(0, capturing=True), emulated.idle():
        fastkd.attention_map(x[:1])
        assert emulated.tickets() >= 64
        fastkd.attention_map(x)
        assert emulated.tickets() == -1
        fastkd.attention_map(x[:1])
        assert emulated.tickets() >= 64


@pytest.mark.skipif(not native.EMULATED, reason="a GPU does not say which counters a call has")
def test_each_stream_has_a_slice_of_its_own_while_there_are_any(cuda):
    s, t = chains(cuda)
    want, whose = step("fsp_loss", s, t), {}
    for handle in [*range(100, 170)] * 2:
        with emulated.stream(handle):
            assert equal(step("fsp_loss", s, t), want)
        whose.setdefault(handle, set()).add(emulated.tickets())
    assert all(len(slices) == 1 for slices in whose.values())
    slices = [slice for (slice,) in whose.values()]
    shared = [slice for slice in slices if slice >= 0]
    assert len(set(shared)) == len(shared) <= 64 and slices == shared + [-1] * (len(slices) - len(shared))
    for count in (1 << 14, (1 << 14) + 1):  # a slice has no more counters
        with emulated.stream(100), emulated.idle():
            fastkd.attention_map(cuda(torch.ones(count, 1, 1)))
        assert emulated.tickets() == (slices[0] if count == 1 << 14 else -1)


# on a GPU


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("call", CALLS)
def test_compiled_calls_run_in_cuda_graphs_of_pytorch(cuda, call):
    """mode="reduce-overhead" refuses what a call keeps in a graph's private pool."""
    torch.compiler.reset()
    s, t = chains(cuda)
    compiled = torch.compile(CALLS[call], mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(s, t)
        got = [loss.clone(), *torch.autograd.grad(loss, s, allow_unused=True)]
        for a, b in zip(got, step(call, s, t), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b)
        with torch.no_grad():
            for x in (*s, *t):
                x.copy_(torch.randn_like(x))


@gpu
@pytest.mark.parametrize("call", CALLS)
def test_a_users_memory_pool_keeps_nothing_of_a_call(cuda, call):
    s, t = chains(cuda)
    want = step(call, s, t)
    torch.cuda.synchronize()
    pool = torch.cuda.MemPool()
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.use_mem_pool(pool):
        assert equal(step(call, s, t), want)
    torch.cuda.synchronize()
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert blocks and not [block for block in blocks if block["state"].startswith("active")]


@gpu
@pytest.mark.parametrize("call", CALLS)
def test_graphs_are_replayed_side_by_side(cuda, call):
    pairs = [chains(cuda, batch=64) for _ in range(3)]
    want = [step(call, *pair) for pair in pairs]
    streams, graphs, got = [torch.cuda.Stream() for _ in pairs], [], []
    torch.cuda.synchronize()
    for pair in pairs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got.append(step(call, *pair))
        graphs.append(graph)
    for _ in range(20):
        for stream, graph in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        assert all(equal(g, w) for g, w in zip(got, want))
