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
    positions = tl.cast(size[0], tl.int64) * size[1] * size[2]
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
def offset(n, c, d, h, w, strides):
    return n * strides[0] + c * strides[1] + d * strides[2] + h * strides[3] + w * strides[4]


@triton.jit
def step(d, h, w, i, size, of, extent, mask):
    """Position i of the windows, over a grid of ``size``, of the outputs (d, h, w) of ``of``, and whether it
    lies within each.
    """
    dd = d * size[0] // of[0] + i // (extent[1] * extent[2])
    hh = h * size[1] // of[1] + i // extent[2] % extent[1]
    ww = w * size[2] // of[2] + i % extent[2]
    d_in = dd < ((d + 1) * size[0] + of[0] - 1) // of[0]
    h_in = hh < ((h + 1) * size[1] + of[1] - 1) // of[1]
    w_in = ww < ((w + 1) * size[2] + of[2] - 1) // of[2]
    return dd, hh, ww, mask & d_in & h_in & w_in


@triton.jit
def volume(d, h, w, size, of):
    """How many positions the window of output (d, h, w) of ``of`` covers, over a grid of ``size``."""
    deep = ((d + 1) * size[0] + of[0] - 1) // of[0] - d * size[0] // of[0]
    high = ((h + 1) * size[1] + of[1] - 1) // of[1] - h * size[1] // of[1]
    wide = ((w + 1) * size[2] + of[2] - 1) // of[2] - w * size[2] // of[2]
    return (deep * high * wide).to(tl.float32)


@triton.jit
def sent(v, place, at, inside, d, h, w, dd, hh, ww, size, of):
    """What window (dd, hh, ww) sends of v to (d, h, w): its share, or all to the place of the maximum."""
    if place is not None:
        here = ((d * size[1] + h) * size[2] + w).to(tl.int32)
        inside = inside & (tl.load(place + at, mask=inside, other=-1) == here)
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
