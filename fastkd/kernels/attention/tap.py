"""The taps: the attention map's kernels with a ReLU before them, or with the gradient that comes from the
network added on the way.
"""

from __future__ import annotations

from torch import Tensor

from fastkd.kernels.attention.map import gradient, power_sums


def relu_tap(
    x: Tensor, residual: Tensor | None, p: float, channel_reduce: str, signed: bool, eps: float, eps_mode: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """See ``torch.ops.fastkd.relu_tap``."""
    return power_sums(x, residual, True, p, channel_reduce, signed, True, eps, eps_mode)


def tap_backward(
    grad: Tensor | None,
    map_grad: Tensor,
    x: Tensor,
    y: Tensor,
    norm: Tensor,
    p: float,
    channel_reduce: str,
    signed: bool,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """See ``torch.ops.fastkd.tap_backward``."""
    return gradient(map_grad, grad, x, y, norm, False, p, channel_reduce, signed, True, eps, eps_mode)


def relu_tap_backward(
    grad: Tensor | None,
    map_grad: Tensor,
    y: Tensor,
    attention: Tensor,
    norm: Tensor,
    p: float,
    channel_reduce: str,
    signed: bool,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """See ``torch.ops.fastkd.relu_tap_backward``."""
    return gradient(map_grad, grad, y, attention, norm, True, p, channel_reduce, signed, True, eps, eps_mode)
