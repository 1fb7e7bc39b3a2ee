"""Gradients that the forward pass has made already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._implementations import refuse_second_derivative


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
