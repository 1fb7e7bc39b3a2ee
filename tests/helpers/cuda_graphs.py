"""CUDA graphs of whole steps, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def check_captured(step: Callable[[], Sequence[Tensor]], inputs: Iterable[Tensor]) -> None:
    """That a graph of ``step`` gives, for new values of its ``inputs``, what a call gives, bit by bit."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, step(), strict=True))
