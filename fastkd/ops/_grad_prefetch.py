"""Which gradient a loss will be given in the backward pass, guessed in the forward pass, where the features
are still in the cache.

A loss that ends a training step is called with the same upstream gradient step after step: 1, or the loss
scale. On a CPU the forward pass of a loss therefore computes the features' gradients for the gradient it
expects, while it holds each sample; the backward pass hands them out if that is what came, and computes them
from what was saved if not. The bits are the same either way: what differs is the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._private import batched

_MOST = 256  # situations remembered; upstream gradients that never come back would fill a table without bound


class GradPrefetch:
    """The upstream gradients that one operation has seen, in all calls of a process. A race costs time only.

    A guess is the upstream gradient that came the last time in the same situation. A situation has two parts:
    the number of the call since the last backward pass, which distinguishes the losses of one sum, and the
    upstream gradient seen last, which distinguishes losses with backward passes of their own. A guess is made
    if the situation occurred once, or gave the same gradient twice in a row. Before the first backward pass
    it is 1.
    """

    def __init__(self) -> None:
        self._turn, self._last = 0, 1.0
        self._first: float | None = 1.0
        # the gradient that came last in a situation: expected again, or different from the one before
        self._known: dict[tuple[int, float], float] = {}
        self._doubted: dict[tuple[int, float], float] = {}

    def expect(self) -> tuple[tuple[int, float], float | None]:
        """The situation of this call, for :meth:`saw`, and the value to prepare for, or None."""
        situation = self._turn, self._last
        self._turn += 1
        return situation, self._known.get(situation, self._first)

    def saw(self, situation: tuple[int, float], value: float) -> None:
        """Record what the backward pass of the call in that situation was given."""
        if self._known.get(situation) != value:
            self._learn(situation, value)
        self._turn, self._last = 0, value

    def _learn(self, situation: tuple[int, float], value: float) -> None:
        self._first = None
        if len(self._known) + len(self._doubted) >= _MOST:
            self._known.clear()
            self._doubted.clear()
        before = self._known.pop(situation, None)
        if before is None and self._doubted.pop(situation, value) == value:  # never so for NaN
            self._known[situation] = value
        else:
            self._doubted[situation] = value


def take(ctx: Any, grad: Tensor, seen: GradPrefetch) -> Sequence[Tensor]:
    """The gradients ``ctx.prepared``, made by the forward for the upstream gradient that it expected, if
    ``grad`` is that; else nothing.

    They are given away once: autograd may accumulate into them, so a second backward pass computes its own.
    """
    if ctx.expected is None:  # the forward pass did not guess
        return ()
    # a second derivative is wanted, the call is traced, or grad is a batch of gradients
    if torch.is_grad_enabled() or type(grad) is not Tensor or batched(grad):
        return ()
    situation, expected = ctx.expected
    value = grad.item()
    seen.saw(situation, value)
    if value != expected:
        return ()
    prepared, ctx.prepared = ctx.prepared, ()
    return prepared
