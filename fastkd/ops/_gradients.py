"""Gradients that the forward pass has made already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._implementations import refuse_second_derivative
from fastkd._private import batched, keeps_graph


class Scaled(torch.autograd.Function):
    """``apply(operator, upstream, grad, x)`` -> ``grad * upstream``, a function of ``x`` too, whose
    derivative is refused.
    """

    @staticmethod
    def forward(ctx: Any, operator: str, upstream: Tensor, grad: Tensor, x: Tensor) -> Tensor:
        ctx.operator = operator
        return grad * upstream

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative(ctx.operator)


def save(ctx: Any, grads: Sequence[Tensor], sides: Sequence[Tensor], needs: Sequence[bool]) -> None:
    """Saves for :func:`scaled` the sides that need a gradient, and no others: autograd cannot save tensors
    made under inference mode, as a teacher's may be.
    """
    ctx.needs = needs
    pairs = zip(grads, sides, needs, strict=True)
    ctx.save_for_backward(*(x for *pair, need in pairs if need for x in pair))
    ctx.set_materialize_grads(False)


def where_needed(
    make: Callable[[Tensor], Tensor], sides: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """``make(side)`` for each side whose gradient is needed, and a tensor without elements for the others."""
    return [make(x) if need else x.new_empty(0) for x, need in zip(sides, needs, strict=True)]


def scaled(ctx: Any, operator: str, upstream: Tensor | None) -> list[Tensor | None]:
    """The saved gradients times ``upstream``, in the dtypes of the sides; None where none is needed."""
    saved = iter(ctx.saved_tensors)
    return [
        handed_out(operator, upstream, next(saved), next(saved), False)
        if need and upstream is not None
        else None
        for need in ctx.needs
    ]


def handed_out(operator: str, upstream: Tensor, grad: Tensor, x: Tensor, spare: bool) -> Tensor:
    """``grad * upstream`` in the dtype of ``x``. The memory of ``grad`` is reused if ``spare`` is set and the
    backward pass keeps no graph, so that ``grad`` is not needed again.
    """
    # a second derivative is wanted, the call is traced, or upstream is a batch of gradients
    if torch.is_grad_enabled() or type(upstream) is not Tensor or batched(upstream):
        return Scaled.apply(operator, upstream, grad, x).to(x.dtype)
    if keeps_graph() or not spare:
        return (grad * upstream).to(x.dtype)
    return (grad if upstream.item() == 1 else grad.mul_(upstream)).to(x.dtype)
