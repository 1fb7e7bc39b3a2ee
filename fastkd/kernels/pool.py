"""Adaptive pooling, "avg" or "max", of features and energies of one to three spatial dimensions, and its gradient.

PyTorch's own gradients of adaptive pooling add with floating-point atomics on a GPU; here each number gathers what the windows over it
send, in a fixed order. Windows are PyTorch's: output o of O over an axis of I covers [floor(o I / O), ceil((o + 1) I / O)). What is pooled
is the smaller side of what differs in size anyway: a pass over the larger feature, the result in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.launch import Launch, Plans
from fastkd.kernels.tile import slope

BLOCK = 256  # numbers a program pools


@triton.jit
def _split(flat, channels, size, POSITION_FIRST: tl.constexpr):
    """(sample, channel, d, h, w) of an element, counted with channels innermost if POSITION_FIRST. size: (D, H, W)."""
    positions = size[0] * size[1] * size[2]
    n = flat // (channels * positions)
    rest = flat % (channels * positions)
    if POSITION_FIRST:
        c = rest % channels
        s = rest // channels
    else:
        c = rest // positions
        s = rest % positions
    return n, c, s // (size[1] * size[2]), s // size[2] % size[1], s % size[2]


@triton.jit
def _pool(x, out, place, elements, channels, size, x_strides, to, out_strides, extent, MAX: tl.constexpr, POSITION_FIRST: tl.constexpr):
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = _split(flat, channels, to, POSITION_FIRST)
    d0 = d * size[0] // to[0]
    h0 = h * size[1] // to[1]
    w0 = w * size[2] // to[2]
    d1 = ((d + 1) * size[0] + to[0] - 1) // to[0]
    h1 = ((h + 1) * size[1] + to[1] - 1) // to[1]
    w1 = ((w + 1) * size[2] + to[2] - 1) // to[2]
    base = x + n * x_strides[0] + c * x_strides[1]
    best = tl.zeros((256,), tl.float32)
    where = tl.zeros((256,), tl.int32)
    for i in range(0, extent[0] * extent[1] * extent[2]):
        dd = d0 + i // (extent[1] * extent[2])
        hh = h0 + i // extent[2] % extent[1]
        ww = w0 + i % extent[2]
        inside = mask & (dd < d1) & (hh < h1) & (ww < w1)
        v = tl.load(base + dd * x_strides[2] + hh * x_strides[3] + ww * x_strides[4], mask=inside, other=0).to(tl.float32)
        if MAX:
            # the first of equal ones; a NaN is larger than anything
            better = inside & ((v > best) | (v != v) | (i == 0))
            best = tl.where(better, v, best)
            where = tl.where(better, ((dd * size[1] + hh) * size[2] + ww).to(tl.int32), where)
        else:
            best += v
    if not MAX:
        best = best / ((d1 - d0) * (h1 - h0) * (w1 - w0)).to(tl.float32)
    at = n * out_strides[0] + c * out_strides[1] + d * out_strides[2] + h * out_strides[3] + w * out_strides[4]
    tl.store(out + at, best, mask=mask)
    if MAX:
        tl.store(place + at, where, mask=mask)


@triton.jit
def _unpool(
    grad, pooled, place, coefficients, out, elements, channels, size, out_strides, of, strides, extent,
    MAX: tl.constexpr, POSITION_FIRST: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """out = sum over the windows of each number, in order, of its share of upstream k h(pooled)."""
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = _split(flat, channels, size, POSITION_FIRST)
    d0 = d * of[0] // size[0]
    h0 = h * of[1] // size[1]
    w0 = w * of[2] // size[2]
    d1 = ((d + 1) * of[0] + size[0] - 1) // size[0]
    h1 = ((h + 1) * of[1] + size[1] - 1) // size[1]
    w1 = ((w + 1) * of[2] + size[2] - 1) // size[2]
    here = ((d * size[1] + h) * size[2] + w).to(tl.int32)
    total = tl.zeros((256,), tl.float32)
    for i in range(0, extent[0] * extent[1] * extent[2]):
        dd = d0 + i // (extent[1] * extent[2])
        hh = h0 + i // extent[2] % extent[1]
        ww = w0 + i % extent[2]
        inside = mask & (dd < d1) & (hh < h1) & (ww < w1)
        at = n * strides[0] + c * strides[1] + dd * strides[2] + hh * strides[3] + ww * strides[4]
        v = tl.load(coefficients + ((n * of[0] + dd) * of[1] + hh) * of[2] + ww, mask=inside, other=0)
        if grad is not None:
            v *= tl.load(grad).to(tl.float32)
        v *= slope(tl.load(pooled + at, mask=inside, other=0), CONFIG, 0)
        if MAX:
            inside = inside & (tl.load(place + at, mask=inside, other=-1) == here)
        else:
            deep = ((dd + 1) * size[0] + of[0] - 1) // of[0] - dd * size[0] // of[0]
            high = ((hh + 1) * size[1] + of[1] - 1) // of[1] - hh * size[1] // of[1]
            wide = ((ww + 1) * size[2] + of[2] - 1) // of[2] - ww * size[2] // of[2]
            v = v / (deep * high * wide).to(tl.float32)
        total += tl.where(inside, v, 0.0)
    to = n * out_strides[0] + c * out_strides[1] + d * out_strides[2] + h * out_strides[3] + w * out_strides[4]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


def _three(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(D, H, W) and the strides of (N, C, D, H, W)."""
    missing = 5 - len(shape)
    return (1,) * missing + tuple(shape[2:]), (strides[0], strides[1], *[0] * missing, *strides[2:])


def _extent(size: Sequence[int], to: Sequence[int]) -> tuple[int, ...]:
    """The largest window of each axis."""
    return tuple(max(-(-(o + 1) * i // j) - o * i // j for o in range(j)) for i, j in zip(size, to))


def pooled_strides(x: Tensor, target: Sequence[int]) -> tuple[int, ...]:
    """Those of what ``pool`` makes of x: channels stay innermost where they are."""
    return _empty(x, target, "meta").stride()


def _empty(x: Tensor, target: Sequence[int], device: str | torch.device) -> Tensor:
    if x.stride(1) == 1 and x.shape[1] > 1:
        last = len(target) - 1
        order = (target[0], *target[2:], target[1])
        return torch.empty(order, dtype=torch.float32, device=device).movedim(last, 1)
    return torch.empty(tuple(target), dtype=torch.float32, device=device)


_plans = Plans()


def pool(x: Tensor, target: Sequence[int], *, max_pool: bool) -> tuple[Tensor, Tensor | None]:
    """x (N, C, *S) pooled to ``target``, in float32, and for max pooling where in S each maximum lies."""
    out = _empty(x, target, x.device)
    place = torch.empty_like(out, dtype=torch.int32) if max_pool else None
    key = (x.dtype, x.shape, x.stride(), tuple(target), max_pool)
    launch = _plans.get(key)
    if launch is None:
        (size, own), (to, others) = _three(x.shape, x.stride()), _three(target, out.stride())
        elements = out.numel()
        launch = _plans[key] = Launch(
            _pool, math.ceil(elements / BLOCK), elements, x.shape[1], size, own, to, others, _extent(size, to), max_pool, x.stride(1) == 1
        )
    launch((x,), x, out, place)
    return out, place


def unpool(
    coefficients: Tensor, place: Tensor | None, out: Tensor, *, max_pool: bool, like: Tensor, grad: Tensor | None = None,
    power: tuple = (1, False, True, 1.0, 1),
) -> None:  # fmt: skip
    """out (N, C, *S), or (N, *S), = the gradient of what was pooled to ``like`` for the gradient grad * coefficients * h(like)."""
    target = out.unsqueeze(1) if out.dim() < like.dim() else out
    key = (target.dtype, target.shape, target.stride(), like.shape, like.stride(), max_pool, power, grad is None)
    launch = _plans.get(key)
    if launch is None:
        (size, own), (of, others) = _three(target.shape, target.stride()), _three(like.shape, like.stride())
        elements = target.numel()
        # windows that one number lies in, at most: those of pooling the other way
        launch = _plans[key] = Launch(
            _unpool, math.ceil(elements / BLOCK), elements, target.shape[1], size, own, of, others, _extent(of, size), max_pool,
            target.stride(1) == 1, ((True, False, 1, 1, 1, *power),),
        )  # fmt: skip
    launch((like, coefficients, target), grad, like, place, coefficients, target)


def gradient_of_pool(grad: Tensor, x: Tensor, coefficients: Tensor, out: Tensor, power: tuple, *, max_pool: bool) -> None:
    """out = the gradient of x, pooled to the coefficients' size before the power, for the upstream gradient ``grad``. Pools anew."""
    pooled, place = pool(x, (*x.shape[:2], *coefficients.shape[1:]), max_pool=max_pool)
    unpool(coefficients, place, out, max_pool=max_pool, like=pooled, grad=grad, power=power)
