"""The attention map and its backward pass; with a ReLU before and a gradient added, those of the taps
(`attention/tap.py`). One launch each.

Forward: as in `attention/loss.py`, programs sum the powers of some channels over a block of positions; the
last program of a sample normalizes its map; without tickets where a sample is one program's. Backward: dx = g
+ k h(x), tile by tile; each program computes the <g, y> of its sample itself, from 25 KiB of the second-level
cache for 56x56 positions where it streams two or three times 256 KiB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.kernels.attention.map_kernels import map_gradient_kernel, map_kernel
from fastkd.kernels.common.launch import (
    LONGEST,
    Launch,
    Plans,
    config,
    grid,
    key_of,
    matrix_view,
    power,
    power_of_two,
    program_bytes,
    served,
)

_SWITCHES = {"channel_reduce": ("sum", "mean"), "eps_mode": ("clamp", "add")}


def _is(name: str, value: str) -> bool:
    """Whether a switch has its second value; refuses an unknown one."""
    if value not in _SWITCHES[name]:
        raise ValueError(f"{name} must be one of {_SWITCHES[name]}, got {value!r}")
    return value == _SWITCHES[name][1]


class _Common:
    """Of a feature: its view beside other tensors of its shape, the cut, constants of both kernels."""

    def __init__(
        self, x: Tensor, beside: list[Tensor | None], reads: int, channel_reduce: str, eps: float
    ) -> None:
        if not 3 <= x.dim() <= 5:
            raise ValueError(f"x has shape {tuple(x.shape)}: wrong in rank")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        tensors = [x, *[y for y in beside if y is not None]]
        for y in tensors:
            served(y, "a tensor", x.device)
            if y.shape != x.shape or y.dtype != x.dtype:
                raise ValueError(
                    f"a tensor of shape {tuple(y.shape)} and {y.dtype} beside x of {tuple(x.shape)} and"
                    f" {x.dtype}"
                )
        self.view = matrix_view(x.shape, [y.stride() for y in tensors], x.element_size())
        numbers = iter([self.view.numbers(i) for i in range(len(tensors))])
        self.views = [next(numbers) if y is not None else None for y in (x, *beside)]
        self.cut = grid(self.view, program_bytes(reads * self.view.bytes))
        self.share = x.shape[1] if _is("channel_reduce", channel_reduce) else 1
        self.block = min(LONGEST, power_of_two(self.view.positions))
        self.shape = (x.shape[0], *x.shape[2:])
        self.programs = x.shape[0] * self.cut.programs


_plans, _gradient_plans = Plans(), Plans()


def power_sums(
    x: Tensor,
    residual: Tensor | None,
    relu: bool,
    p: float,
    channel_reduce: str,
    signed: bool,
    normalize: bool,
    eps: float,
    eps_mode: str,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """y = relu(x + residual) if ``relu``, and the map of that or of x, and its norms."""
    y = torch.empty_like(x) if relu else None
    key = (
        x.dtype,
        x.shape,
        x.stride(),
        residual is not None and key_of((residual,)),
        relu,
        p,
        channel_reduce,
        signed,
        normalize,
        eps,
        eps_mode,
    )
    plan = _plans.get(key)
    if plan is None:
        c = _Common(x, [residual, y], 1, channel_reduce, eps)
        parts = c.cut.chunks * c.view.fold
        launch = Launch(
            map_kernel,
            c.programs,
            *c.views,
            c.view.positions,
            c.cut.programs,
            c.cut.blocks,
            c.cut.steps,
            parts,
            float(c.share),
            (config(c.view, c.cut, power(p, signed)),),
            c.block,
            normalize,
            float(eps),
            _is("eps_mode", eps_mode),
        )
        plan = _plans[key] = (launch, c.shape, c.shape[0] * parts * c.view.positions, c.cut.programs > 1)
    launch, shape, scratch, ticketed = plan
    if residual is not None and residual.device != x.device:
        raise ValueError(f"tensors of one call lie on {x.device} and {residual.device}")
    out = x.new_empty(shape, dtype=torch.float32)
    norms = x.new_empty(shape[0] if normalize else 0, dtype=torch.float32)
    launch(
        (x,) if residual is None else (x, residual),
        x,
        residual,
        y,
        out,
        norms if normalize else None,
        x.new_empty(scratch, dtype=torch.float32),
        x.new_zeros(shape[0], dtype=torch.int32) if ticketed else None,
    )
    return y, out, norms


def gradient(
    map_grad: Tensor,
    grad: Tensor | None,
    x: Tensor,
    y: Tensor,
    norms: Tensor,
    relu: bool,
    p: float,
    channel_reduce: str,
    signed: bool,
    normalize: bool,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """dx = grad + k h(x), for the gradient of x's map y; behind a ReLU of result x if ``relu``."""
    out = torch.empty_like(x)
    options = (relu, p, channel_reduce, signed, normalize, eps, eps_mode)
    key = (
        x.dtype,
        x.shape,
        x.stride(),
        grad is not None and key_of((grad,)),
        map_grad.shape,
        map_grad.dtype,
        *options,
    )
    plan = _gradient_plans.get(key)
    if plan is None:
        c = _Common(x, [grad, out], 2 if grad is None else 3, channel_reduce, eps)
        if tuple(map_grad.shape) != c.shape or map_grad.dtype != torch.float32:
            raise ValueError(
                f"the map's gradient is {tuple(map_grad.shape)} {map_grad.dtype}, wanted {c.shape} float32"
            )
        plan = _gradient_plans[key] = Launch(
            map_gradient_kernel,
            c.programs,
            *c.views,
            c.view.positions,
            c.cut.programs,
            c.cut.blocks,
            c.cut.steps,
            p / c.share,
            (config(c.view, c.cut, power(p, signed)),),
            c.block,
            normalize,
            float(eps),
            _is("eps_mode", eps_mode),
            relu,
        )
    # small beside x, and read more than once
    map_grad = map_grad.contiguous()
    given: tuple[Any, ...] = (x, map_grad) if grad is None else (x, map_grad, grad)
    plan(given, map_grad, grad, x, y.contiguous() if normalize else None, norms if normalize else None, out)
    return out


def attention_map(
    x: Tensor, p: float, channel_reduce: str, signed: bool, normalize: bool, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    """See ``torch.ops.fastkd.attention_map``."""
    return power_sums(x, None, False, p, channel_reduce, signed, normalize, eps, eps_mode)[1:]


def attention_map_backward(grad: Tensor, x: Tensor, y: Tensor, norm: Tensor, *options: Any) -> Tensor:
    """See ``torch.ops.fastkd.attention_map_backward``."""
    return gradient(grad, None, x, y, norm, False, *options)
