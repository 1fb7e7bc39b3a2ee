"""Gradients for a batch of upstream gradients (``is_grads_batched=True``), which PyTorch's own operations
support and the kernels do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd._implementations import Backend
from fastkd.reference.common import widen


def by_reference(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of ``formula(*inputs)`` by plain PyTorch, in its result's dtype; None by ``needs``."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        wide = widen(*inputs)
        wanted = [x for x, need in zip(wide, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*wide), wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def scaled(
    impl: Backend, operator: str, grad: Tensor, features: Sequence[Tensor], *rest: object
) -> list[Tensor]:
    """As ``impl.run_backward`` for the backward operator of a loss: run for a gradient of 1, since the
    results are linear in it.
    """
    one = torch.ones((), dtype=grad.dtype, device=grad.device)
    found = impl.run_backward(operator, one, [widen(x)[0] for x in features], *rest)
    return [dx * grad for dx in found]
