"""Windows of adaptive pooling, for kernels that pool and for those that send gradients back.

Windows are PyTorch's: output o of O over an axis of I covers [floor(o I / O), ceil((o + 1) I / O)). The
outputs whose windows hold an input are the window of pooling the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # elements a program


@triton.jit
def element(flat, channels, size, POSITION_FIRST: tl.constexpr):
    """(sample, channel, d, h, w) of an element, channels innermost if POSITION_FIRST. size: (D, H, W)."""
    depth, height, width = size
    positions = tl.cast(depth, tl.int64) * height * width
    n = flat // (channels * positions)
    rest = flat % (channels * positions)
    if POSITION_FIRST:
        c = rest % channels
        s = rest // channels
    else:
        c = rest // positions
        s = rest % positions
    return n, c, s // (height * width), s // width % height, s % width


@triton.jit
def place_in(d, h, w, size):
    """The number of position (d, h, w) in a grid of ``size``."""
    _, height, width = size
    return ((d * height + h) * width + w).to(tl.int32)


@triton.jit
def offset(n, c, d, h, w, strides):
    stride_n, stride_c, stride_d, stride_h, stride_w = strides
    return n * stride_n + c * stride_c + d * stride_d + h * stride_h + w * stride_w


@triton.jit
def step(d, h, w, i, size, of, extent, mask):
    """Position i of the windows, over a grid of ``size``, of the outputs (d, h, w) of ``of``, and whether it
    lies within each.
    """
    depth, height, width = size
    of_d, of_h, of_w = of
    _, high, wide = extent
    dd = d * depth // of_d + i // (high * wide)
    hh = h * height // of_h + i // wide % high
    ww = w * width // of_w + i % wide
    d_in = dd < ((d + 1) * depth + of_d - 1) // of_d
    h_in = hh < ((h + 1) * height + of_h - 1) // of_h
    w_in = ww < ((w + 1) * width + of_w - 1) // of_w
    return dd, hh, ww, mask & d_in & h_in & w_in


@triton.jit
def volume(d, h, w, size, of):
    """How many positions the window of output (d, h, w) of ``of`` covers, over a grid of ``size``."""
    depth, height, width = size
    of_d, of_h, of_w = of
    deep = ((d + 1) * depth + of_d - 1) // of_d - d * depth // of_d
    high = ((h + 1) * height + of_h - 1) // of_h - h * height // of_h
    wide = ((w + 1) * width + of_w - 1) // of_w - w * width // of_w
    return (deep * high * wide).to(tl.float32)


@triton.jit
def sent(v, place, at, inside, d, h, w, dd, hh, ww, size, of):
    """What window (dd, hh, ww) sends of v to (d, h, w): its share, or all to the place of the maximum."""
    if place is not None:
        inside = inside & (tl.load(place + at, mask=inside, other=-1) == place_in(d, h, w, size))
    else:
        v = v / volume(dd, hh, ww, size, of)
    return tl.where(inside, v, 0.0)


def spatial(shape: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(D, H, W) and the strides of (N, C, D, H, W)."""
    missing = 5 - len(shape)
    return (1,) * missing + tuple(shape[2:]), (strides[0], strides[1], *[0] * missing, *strides[2:])


def largest_window(size: Sequence[int], to: Sequence[int]) -> tuple[int, ...]:
    """The largest window of each axis."""
    return tuple(max(-(-(o + 1) * i // j) - o * i // j for o in range(j)) for i, j in zip(size, to))


def empty_pooled(x: Tensor, target: Sequence[int], device: str | torch.device) -> Tensor:
    """For x pooled to ``target``, in float32: channels stay innermost where they are."""
    if x.stride(1) == 1 and x.shape[1] > 1:
        last = len(target) - 1
        order = (target[0], *target[2:], target[1])
        return torch.empty(order, dtype=torch.float32, device=device).movedim(last, 1)
    return torch.empty(tuple(target), dtype=torch.float32, device=device)


def pooled_strides(x: Tensor, target: Sequence[int]) -> tuple[int, ...]:
    return empty_pooled(x, target, "meta").stride()
