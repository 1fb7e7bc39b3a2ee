"""The attention map and its backward pass; with a ReLU before and a gradient added, those of the taps
(`attention/tap.py`). One launch each.

Forward: as in `attention/loss.py`, programs sum energies of some channels over a block of positions, and the
last program of a sample normalizes its map; without tickets where a sample is one program's. Backward: dx = g
+ k h(x), tile by tile; each program finds the <g, y> of its sample anew, from 25 KiB of the second-level
cache for 56x56 positions where it streams two or three times 256 KiB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.common.launch import (
    LONGEST,
    Launch,
    Plans,
    config,
    grid,
    key_of,
    power,
    power_of_two,
    program_bytes,
    served,
    walk,
)
from fastkd.kernels.common.tile import (
    along_gradient,
    collapse,
    last_of,
    normalization,
    normalized,
    places,
    row_step,
    rows_of,
    slope,
    sum_energies,
)

# not specialized: a new size need not be a new kernel
_COUNTS = ["positions", "programs", "blocks", "steps", "parts"]


@triton.jit(do_not_specialize=_COUNTS)
def _map(
    x, residual, y, out, norms, scratch, tickets,
    x_walk, residual_walk, y_walk, positions, programs, blocks, steps, parts, divisor,
    CONFIG: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr, ADD_EPS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // programs).to(tl.int64)
    mine = pid % programs
    sums = scratch + n * parts * positions
    sum_energies(
        x,
        x_walk,
        n,
        mine % blocks,
        mine // blocks,
        steps,
        sums,
        CONFIG,
        0,
        y,
        y_walk,
        residual,
        residual_walk,
    )
    if tickets is None:
        tl.debug_barrier()
        last = n == n
    else:
        last = last_of(tickets + n, programs)
    if last:
        norm = tl.sqrt(collapse(sums, parts, positions, BLOCK)) / divisor
        reciprocal = tl.full((), 1.0, tl.float64) / divisor
        if NORMALIZE:
            tl.store(norms + n, norm.to(tl.float32))
            reciprocal = tl.full((), 1.0, tl.float64) / (normalization(norm, EPS, ADD_EPS)[0] * divisor)
        for first in range(0, positions, BLOCK):
            s = first + tl.arange(0, BLOCK)
            mask = s < positions
            tl.store(
                out + n * positions + s,
                normalized(tl.load(sums + s, mask=mask, other=0), reciprocal),
                mask=mask,
            )


@triton.jit(do_not_specialize=_COUNTS[:4])
def _map_gradient(
    map_grad, grad, x, y, norms, out,
    x_walk, grad_walk, out_walk, positions, programs, blocks, steps, gain,
    CONFIG: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr, ADD_EPS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = (pid // programs).to(tl.int64)
    mine = pid % programs
    ROWS: tl.constexpr = CONFIG[0][3]
    LENGTH: tl.constexpr = CONFIG[0][4]
    rows_count, length = rows_of(x_walk, CONFIG, 0)
    rows = tl.arange(0, ROWS)
    position = (mine % blocks) * LENGTH + tl.arange(0, LENGTH)
    inside = position < length
    own = n * positions + position % positions
    k = tl.load(map_grad + own, mask=inside, other=0)
    if NORMALIZE:
        dots = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, positions, BLOCK):
            s = first + tl.arange(0, BLOCK)
            at = n * positions + s
            dots += tl.load(map_grad + at, mask=s < positions, other=0).to(tl.float64) * tl.load(
                y + at, mask=s < positions, other=0
            )
        _, has_along, along, scale = normalization(tl.load(norms + n).to(tl.float64), EPS, ADD_EPS)
        k = along_gradient(
            k, tl.load(y + own, mask=inside, other=0), tl.sum(dots, 0), has_along, along, scale
        )
    k = (k.to(tl.float64) * gain).to(tl.float32)
    first = (mine // blocks) * steps * ROWS
    at = x + places(x_walk, CONFIG, 0, n, first, rows, position)
    to = out + places(out_walk, CONFIG, 0, n, first, rows, position)
    if grad is not None:
        grad_at = grad + places(grad_walk, CONFIG, 0, n, first, rows, position)
    for row in range(first, tl.minimum(first + steps * ROWS, rows_count), ROWS):
        mask = (row + rows < rows_count)[:, None] & inside[None, :]
        v = tl.load(at, mask=mask, other=0).to(tl.float32)
        dx = slope(v, CONFIG, 0) * k[None, :]
        if grad is not None:
            dx += tl.load(grad_at, mask=mask, other=0).to(tl.float32)
            grad_at += row_step(grad_walk, CONFIG, 0)
        if RELU:
            # a NaN lets pass, as in PyTorch
            dx = tl.where(v <= 0, 0.0, dx)
        tl.store(to, dx.to(out.dtype.element_ty), mask=mask)
        at += row_step(x_walk, CONFIG, 0)
        to += row_step(out_walk, CONFIG, 0)


_SWITCHES = {"channel_reduce": ("sum", "mean"), "eps_mode": ("clamp", "add")}


def _is(name: str, value: str) -> bool:
    """Whether a switch has its second value; refuses an unknown one."""
    if value not in _SWITCHES[name]:
        raise ValueError(f"{name} must be one of {_SWITCHES[name]}, got {value!r}")
    return value == _SWITCHES[name][1]


class _Common:
    """Of a feature: its walk beside other tensors of its shape, the cut, and the constants of both kernels."""

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
        self.walk = walk(x.shape, [y.stride() for y in tensors], x.element_size())
        numbers = iter([self.walk.numbers(i) for i in range(len(tensors))])
        self.walks = [next(numbers) if y is not None else None for y in (x, *beside)]
        self.cut = grid(self.walk, program_bytes(reads * self.walk.bytes))
        self.share = x.shape[1] if _is("channel_reduce", channel_reduce) else 1
        self.block = min(LONGEST, power_of_two(self.walk.positions))
        self.shape = (x.shape[0], *x.shape[2:])
        self.programs = x.shape[0] * self.cut.programs


_plans, _gradient_plans = Plans(), Plans()


def energies(
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
        parts = c.cut.chunks * c.walk.fold
        launch = Launch(
            _map, c.programs, *c.walks, c.walk.positions, c.cut.programs, c.cut.blocks, c.cut.steps, parts, float(c.share),
            (config(c.walk, c.cut, power(p, signed)),), c.block, normalize, float(eps), _is("eps_mode", eps_mode),
        )  # fmt: skip
        plan = _plans[key] = (launch, c.shape, c.shape[0] * parts * c.walk.positions, c.cut.programs > 1)
    launch, shape, scratch, ticketed = plan
    if residual is not None and residual.device != x.device:
        raise ValueError(f"tensors of one call lie on {x.device} and {residual.device}")
    out = x.new_empty(shape, dtype=torch.float32)
    norms = x.new_empty(shape[0] if normalize else 0, dtype=torch.float32)
    launch(
        (x,) if residual is None else (x, residual), x, residual, y, out, norms if normalize else None,
        x.new_empty(scratch, dtype=torch.float32), x.new_zeros(shape[0], dtype=torch.int32) if ticketed else None,
    )  # fmt: skip
    return y, out, norms


def gradient(
    map_grad: Tensor, grad: Tensor | None, x: Tensor, y: Tensor, norms: Tensor, relu: bool, p: float, channel_reduce: str, signed: bool,
    normalize: bool, eps: float, eps_mode: str,
) -> Tensor:  # fmt: skip
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
            _map_gradient, c.programs, *c.walks, c.walk.positions, c.cut.programs, c.cut.blocks, c.cut.steps, p / c.share,
            (config(c.walk, c.cut, power(p, signed)),), c.block, normalize, float(eps),
            _is("eps_mode", eps_mode), relu,
        )  # fmt: skip
    # small beside x, and read more than once
    map_grad = map_grad.contiguous()
    given: tuple[Any, ...] = (x, map_grad) if grad is None else (x, map_grad, grad)
    plan(given, map_grad, grad, x, y.contiguous() if normalize else None, norms if normalize else None, out)
    return out


def attention_map(
    x: Tensor, p: float, channel_reduce: str, signed: bool, normalize: bool, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    """See ``torch.ops.fastkd.attention_map``."""
    return energies(x, None, False, p, channel_reduce, signed, normalize, eps, eps_mode)[1:]


def attention_map_backward(grad: Tensor, x: Tensor, y: Tensor, norm: Tensor, *options: Any) -> Tensor:
    """See ``torch.ops.fastkd.attention_map_backward``."""
    return gradient(grad, None, x, y, norm, False, *options)
