"""Which gradient a loss will be given in the backward pass, guessed in the forward pass, where the features are still in the cache.

A loss that ends a training step is called with the same upstream gradient step after step: 1, or the loss scale. On a CPU the forward pass
of a loss therefore computes the features' gradients for the gradient it expects, while it holds each sample; the backward pass hands them
out if that is what came, and computes them from what was saved if not. The bits are the same either way: what differs is the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Upstream:
    """The upstream gradients that one operation has seen. Shared by all calls of a process; a race costs time, never a result."""

    def __init__(self) -> None:
        self._last, self._steady = 1.0, True

    @property
    def expected(self) -> float | None:
        """The value to prepare for; None while the values change from call to call."""
        return self._last if self._steady else None

    def saw(self, value: float) -> None:
        """Record what a backward pass was given."""
        self._steady = value == self._last
        self._last = value


def take_prepared(ctx: Any, grad: Tensor, seen: Upstream) -> Sequence[Tensor]:
    """The gradients ``ctx.prepared``, made by the forward for the upstream gradient ``ctx.expected``, if ``grad`` is that; else nothing.

    They are given away once: autograd may accumulate into them, so a second backward pass computes its own.
    """
    if torch.is_grad_enabled() or type(grad) is not Tensor:  # a second derivative is wanted, or the call is traced
        return ()
    value = grad.item()
    seen.saw(value)
    if value != ctx.expected:
        return ()
    prepared, ctx.prepared = ctx.prepared, ()
    return prepared
