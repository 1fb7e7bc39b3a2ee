"""The gradient of a feature whose FSP terms were pooled to other sizes: the sum of what their windows send,
in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.common.launch import Launch, Plans
from fastkd.kernels.common.windows import BLOCK, element, largest_window, offset, sent, spatial, step


@triton.jit
def _gathered(term, place, mask, n, c, d, h, w, size, of, strides, largest):
    """What the windows over each position send of ``term``."""
    total = tl.zeros((256,), tl.float32)
    deep, high, wide = largest
    for i in range(0, deep * high * wide):
        dd, hh, ww, inside = step(d, h, w, i, of, size, largest, mask)
        at = offset(n, c, dd, hh, ww, strides)
        total += sent(
            tl.load(term + at, mask=inside, other=0), place, at, inside, d, h, w, dd, hh, ww, size, of
        )
    return total


@triton.jit
def _spread(
    terms,
    places,
    out,
    elements,
    channels,
    size,
    out_strides,
    ofs,
    strides,
    extents,
    TERMS: tl.constexpr,
    POSITION_FIRST: tl.constexpr,
):
    flat = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    mask = flat < elements
    n, c, d, h, w = element(flat, channels, size, POSITION_FIRST)
    total = tl.zeros((256,), tl.float32)
    for i in tl.static_range(TERMS):
        total += _gathered(terms[i], places[i], mask, n, c, d, h, w, size, ofs[i], strides[i], extents[i])
    tl.store(out + offset(n, c, d, h, w, out_strides), total.to(out.dtype.element_ty), mask=mask)


_plans = Plans()


def spread(terms: Sequence[tuple[Tensor, Tensor | None]], out: Tensor) -> None:
    """out (N, C, *S) = the sum of the gradients of what was pooled to the sizes of ``terms``, (gradient,
    where the maxima lay or None).
    """
    pooled, places = tuple([t for t, _ in terms]), tuple([p for _, p in terms])
    key = (out.dtype, out.shape, out.stride(), *[(t.shape, t.stride(), p is None) for t, p in terms])
    launch = _plans.get(key)
    if launch is None:
        size, own = spatial(out.shape, out.stride())
        ofs, strides = zip(*(spatial(t.shape, t.stride()) for t in pooled))
        # windows that one number lies in, at most: those of pooling the other way
        extents = tuple(largest_window(of, size) for of in ofs)
        elements = out.numel()
        launch = _plans[key] = Launch(
            _spread,
            math.ceil(elements / BLOCK),
            elements,
            out.shape[1],
            size,
            own,
            ofs,
            strides,
            extents,
            len(terms),
            out.stride(1) == 1,
        )
    launch((*pooled, out), pooled, places, out)
