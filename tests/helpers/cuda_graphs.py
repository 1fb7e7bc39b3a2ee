"""CUDA graphs of whole steps, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

import fastkd


def check_captured(step: Callable[[], Sequence[Tensor]], inputs: Iterable[Tensor]) -> None:
    """A graph of ``step`` must give, for new values of its ``inputs``, what a call gives, bit by bit."""
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


def check_step_captured(function: str) -> None:
    """The same of a step of AT, FSP or ``relu_tap``, by the backend that is chosen."""
    s, t = ([torch.randn(4, c, n, n, device="cuda") for c, n in ((16, 32), (64, 7))] for _ in range(2))
    s = [x.requires_grad_() for x in s]

    def step() -> Sequence[Tensor]:
        if function == "relu_tap":
            return torch.autograd.grad(
                sum((v * v).sum() for x, y in zip(s, t) for v in fastkd.relu_tap(x, y)), s
            )
        return torch.autograd.grad(getattr(fastkd, function)(s, t, weight=1000.0), s)

    check_captured(step, [*s, *t])
