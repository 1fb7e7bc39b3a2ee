"""The gradient of a feature whose FSP terms were pooled to other sizes: the sum of what their windows send, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.launch import Launch, Plans
from fastkd.kernels.pool import BLOCK, _extent, _split, _three


@triton.jit
def _gathered(term, place, mask, n, c, d, h, w, size, of, strides, extent):
    """What the windows over each position send of ``term``: a share each, or all to where ``place`` says the maximum was."""
    d0 = d * of[0] // size[0]
    h0 = h * of[1] // size[1]
    w0 = w * of[2] // size[2]
    d1 = ((d + 1) * of[0] + size[0] - 1) // size[0]
    h1 = ((h + 1) * of[1] + size[1] - 1) // size[1]
    w1 = ((w + 1) * of[2] + size[2] - 1) // size[2]
    total = tl.zeros((256,), tl.float32)
    for i in range(0, extent[0] * extent[1] * extent[2]):
        dd = d0 + i // (extent[1] * extent[2])
        hh = h0 + i // extent[2] % extent[1]
        ww = w0 + i % extent[2]
        inside = mask & (dd < d1) & (hh < h1) & (ww < w1)
        at = n * strides[0] + c * strides[1] + dd * strides[2] + hh * strides[3] + ww * strides[4]
        v = tl.load(term + at, mask=inside, other=0)
        if place is not None:
            here = ((d * size[1] + h) * size[2] + w).to(tl.int32)
            v = tl.where(tl.load(place + at, mask=inside, other=-1) == here, v, 0.0)
        else:
            deep = ((dd + 1) * size[0] + of[0] - 1) // of[0] - dd * size[0] // of[0]
            high = ((hh + 1) * size[1] + of[1] - 1) // of[1] - hh * size[1] // of[1]
            wide = ((ww + 1) * size[2] + of[2] - 1) // of[2] - ww * size[2] // of[2]
            v = v / (deep * high * wide).to(tl.float32)
        total += tl.where(inside, v, 0.0)
    return total


@triton.jit
def _spread(
    terms, places, out, elements, channels, size, out_strides, ofs, strides, extents, TERMS: tl.constexpr, POSITION_FIRST: tl.constexpr
):
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = _split(flat, channels, size, POSITION_FIRST)
    total = tl.zeros((256,), tl.float32)
    for i in tl.static_range(TERMS):
        total += _gathered(terms[i], places[i], mask, n, c, d, h, w, size, ofs[i], strides[i], extents[i])
    to = n * out_strides[0] + c * out_strides[1] + d * out_strides[2] + h * out_strides[3] + w * out_strides[4]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=mask)


_plans = Plans()


def spread(terms: Sequence[tuple[Tensor, Tensor | None]], out: Tensor) -> None:
    """out (N, C, *S) = the sum of the gradients of what was pooled to the sizes of ``terms``, (gradient, where the maxima lay or None)."""
    pooled, places = tuple([t for t, _ in terms]), tuple([p for _, p in terms])
    key = (out.dtype, out.shape, out.stride(), *[(t.shape, t.stride(), p is None) for t, p in terms])
    launch = _plans.get(key)
    if launch is None:
        size, own = _three(out.shape, out.stride())
        ofs, strides = zip(*(_three(t.shape, t.stride()) for t in pooled))
        # windows that one number lies in, at most: those of pooling the other way
        extents = tuple(_extent(of, size) for of in ofs)
        elements = out.numel()
        launch = _plans[key] = Launch(
            _spread, math.ceil(elements / BLOCK), elements, out.shape[1], size, own, ofs, strides, extents, len(terms), out.stride(1) == 1
        )
    launch((*pooled, out), pooled, places, out)
