"""Adaptive pooling, "avg" or "max", of features and channel power sums in 1 to 3 dimensions; its gradient.

PyTorch's own gradients of adaptive pooling add with floating-point atomics on a GPU; here each number gathers
what the windows over it send, in a fixed order. What is pooled is the smaller side of what differs in size
anyway: a pass over the larger feature, the result in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.common.launch import Launch, Plans, fits
from fastkd.kernels.common.tile import slope
from fastkd.kernels.common.windows import (
    BLOCK,
    element,
    empty_pooled,
    largest_window,
    offset,
    place_in,
    sent,
    spatial,
    step,
    volume,
)


@triton.jit
def _pool(
    x,
    out,
    place,
    elements,
    channels,
    size,
    x_strides,
    to,
    out_strides,
    largest,
    MAX: tl.constexpr,
    POSITION_FIRST: tl.constexpr,
):
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = element(flat, channels, to, POSITION_FIRST)
    best = tl.zeros((256,), tl.float32)
    where = tl.zeros((256,), tl.int32)
    deep, high, wide = largest
    for i in range(0, deep * high * wide):
        dd, hh, ww, inside = step(d, h, w, i, size, to, largest, mask)
        v = tl.load(x + offset(n, c, dd, hh, ww, x_strides), mask=inside, other=0).to(tl.float32)
        if MAX:
            # the first of equal ones; a NaN is larger than anything
            better = inside & ((v > best) | (v != v) | (i == 0))
            best = tl.where(better, v, best)
            where = tl.where(better, place_in(dd, hh, ww, size), where)
        else:
            best += v
    if not MAX:
        best = best / volume(d, h, w, size, to)
    at = offset(n, c, d, h, w, out_strides)
    tl.store(out + at, best, mask=mask)
    if MAX:
        tl.store(place + at, where, mask=mask)


@triton.jit
def _unpool(
    grad,
    pooled,
    place,
    coefficients,
    out,
    elements,
    channels,
    size,
    out_strides,
    of,
    strides,
    largest,
    POSITION_FIRST: tl.constexpr,
    CONFIG: tl.constexpr,
):
    """out = sum over the windows of each number, in order, of its share of upstream k h(pooled)."""
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = element(flat, channels, size, POSITION_FIRST)
    of_d, of_h, of_w = of
    total = tl.zeros((256,), tl.float32)
    deep, high, wide = largest
    for i in range(0, deep * high * wide):
        dd, hh, ww, inside = step(d, h, w, i, of, size, largest, mask)
        at = offset(n, c, dd, hh, ww, strides)
        here = coefficients + ((n * of_d + dd) * of_h + hh) * of_w + ww
        v = tl.load(here, mask=inside, other=0)
        if grad is not None:
            v *= tl.load(grad).to(tl.float32)
        v *= slope(tl.load(pooled + at, mask=inside, other=0), CONFIG, 0)
        total += sent(v, place, at, inside, d, h, w, dd, hh, ww, size, of)
    tl.store(out + offset(n, c, d, h, w, out_strides), total.to(out.dtype.element_ty), mask=mask)


_plans = Plans()


def pool(x: Tensor, target: Sequence[int], *, max_pool: bool) -> tuple[Tensor, Tensor | None]:
    """x (N, C, *S) pooled to ``target``, in float32, and for max pooling where in S each maximum lies."""
    out = empty_pooled(x, target, x.device)
    place = torch.empty_like(out, dtype=torch.int32) if max_pool else None
    key = (x.dtype, x.shape, x.stride(), tuple(target), max_pool)
    launch = _plans.get(key)
    if launch is None:
        fits(x.shape[1], math.prod(x.shape[2:]))
        (size, own), (to, others) = spatial(x.shape, x.stride()), spatial(target, out.stride())
        elements = out.numel()
        launch = _plans[key] = Launch(
            _pool,
            math.ceil(elements / BLOCK),
            elements,
            x.shape[1],
            size,
            own,
            to,
            others,
            largest_window(size, to),
            max_pool,
            x.stride(1) == 1,
        )
    launch((x,), x, out, place)
    return out, place


def unpool(
    coefficients: Tensor,
    place: Tensor | None,
    out: Tensor,
    *,
    max_pool: bool,
    like: Tensor,
    grad: Tensor | None = None,
    power: tuple = (1, False, True, 1.0, 1),
) -> None:
    """out (N, C, *S), or (N, *S), = the gradient of what was pooled to ``like`` for the gradient grad *
    coefficients * h(like).
    """
    target = out.unsqueeze(1) if out.dim() < like.dim() else out
    key = (
        target.dtype,
        target.shape,
        target.stride(),
        like.shape,
        like.stride(),
        max_pool,
        power,
        grad is None or grad.dtype,
    )
    launch = _plans.get(key)
    if launch is None:
        (size, own), (of, others) = spatial(target.shape, target.stride()), spatial(like.shape, like.stride())
        elements = target.numel()
        # windows that one number lies in, at most: those of pooling the other way
        launch = _plans[key] = Launch(
            _unpool,
            math.ceil(elements / BLOCK),
            elements,
            target.shape[1],
            size,
            own,
            of,
            others,
            largest_window(of, size),
            target.stride(1) == 1,
            ((True, False, 1, 1, 1, *power),),
        )
    given = (like, coefficients, target) if grad is None else (like, coefficients, target, grad)
    launch(given, grad, like, place, coefficients, target)


def gradient_of_pool(
    grad: Tensor, x: Tensor, coefficients: Tensor, out: Tensor, power: tuple, *, max_pool: bool
) -> None:
    """out = the gradient of x, pooled to the coefficients' size before the power, for the upstream gradient
    ``grad``. Pools again.
    """
    pooled, place = pool(x, (*x.shape[:2], *coefficients.shape[1:]), max_pool=max_pool)
    unpool(coefficients, place, out, max_pool=max_pool, like=pooled, grad=grad, power=power)
