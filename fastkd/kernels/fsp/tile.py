"""What the FSP kernels have in common: where a block of a feature lies, and its numbers, averaged over
pooling windows.

V[J] is what of a view is constant, `View.config` of fsp/view.py, ``view`` its numbers; fsp/fields.py names
their places. Constants are handed down whole: Triton 3.6 takes numbers out of tuples in a tuple, and nothing
deeper, and passes no part of one on as a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.fsp.fields import (
    CHANNELS,
    GRID_H,
    GRID_W,
    IS_FAR,
    IS_FLAT,
    PART_D,
    PART_H,
    PART_W,
    PARTS_H,
    PARTS_W,
    POSITIONS,
    ROWS_INNER,
    STEP_D,
    STEP_H,
    STEP_W,
    STRIDE_C,
    STRIDE_N,
    UNIT,
    WINDOW_D,
    WINDOW_H,
    WINDOW_W,
    WITHIN_D,
    WITHIN_H,
    WITHIN_W,
)


@triton.jit
def zeros(rows, columns):
    """A sum of nothing for each row and column. Triton 3.6 makes no shape of parts of constants."""
    return tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)


@triton.jit
def extent(view, V: tl.constexpr, J: tl.constexpr):
    """The number of channels, and of positions of the grid of the products."""
    if V[J][ROWS_INNER]:
        return view[CHANNELS] * V[J][UNIT], view[POSITIONS]
    else:
        return view[CHANNELS], view[POSITIONS] * V[J][UNIT]


@triton.jit
def sample(view, V: tl.constexpr, J: tl.constexpr, n):
    """Offset of sample n, in int64 as n is; offsets within a sample are so where it is that large: addresses
    take registers.
    """
    if V[J][IS_FLAT]:
        return n * view[STRIDE_N] * V[J][UNIT]
    else:
        return n * view[STRIDE_N]


@triton.jit
def _offset(i, V: tl.constexpr, J: tl.constexpr):
    if V[J][IS_FAR]:
        return tl.cast(i, tl.int64)
    else:
        return tl.cast(i, tl.int32)


@triton.jit
def across(view, V: tl.constexpr, J: tl.constexpr, row):
    """Offsets of channels ``row``."""
    if V[J][ROWS_INNER]:
        return _offset(row, V, J)
    elif V[J][IS_FLAT]:
        return _offset(row, V, J) * view[STRIDE_C] * V[J][UNIT]
    else:
        return _offset(row, V, J) * view[STRIDE_C]


@triton.jit
def along(view, V: tl.constexpr, J: tl.constexpr, position):
    """Offsets of positions, of each the first number of its window."""
    if V[J][ROWS_INNER]:
        return _offset(position, V, J) * view[STEP_W] * V[J][UNIT]
    elif V[J][IS_FLAT]:
        return _offset(position, V, J) * view[STEP_W]
    else:
        line = position // view[GRID_W]
        plane = _offset(line // view[GRID_H], V, J)
        return (
            plane * view[STEP_D]
            + _offset(line % view[GRID_H], V, J) * view[STEP_H]
            + _offset(position % view[GRID_W], V, J) * view[STEP_W]
        )


@triton.jit
def part(view, V: tl.constexpr, J: tl.constexpr, j):
    """Offset of the j-th of the numbers that lie at one position of a coarser grid."""
    j = _offset(j, V, J)
    d = j // (V[J][PARTS_H] * V[J][PARTS_W])
    h = j // V[J][PARTS_W] % V[J][PARTS_H]
    w = j % V[J][PARTS_W]
    return d * view[PART_D] + h * view[PART_H] + w * view[PART_W]


@triton.jit
def read(at, mask, view, V: tl.constexpr, J: tl.constexpr):
    """In float32, the average over the pooling window."""
    # a part of a constant is a constant only once it is named one
    DEEP: tl.constexpr = V[J][WINDOW_D]
    HIGH: tl.constexpr = V[J][WINDOW_H]
    WIDE: tl.constexpr = V[J][WINDOW_W]
    if DEEP * HIGH * WIDE == 1:
        return tl.load(at, mask=mask, other=0).to(tl.float32)
    else:
        total = tl.zeros(mask.shape, tl.float32)
        for d in tl.static_range(DEEP):
            for h in tl.static_range(HIGH):
                for w in tl.static_range(WIDE):
                    more = (
                        _offset(view[WITHIN_D], V, J) * d
                        + _offset(view[WITHIN_H], V, J) * h
                        + _offset(view[WITHIN_W], V, J) * w
                    )
                    total += tl.load(at + more, mask=mask, other=0).to(tl.float32)
        return total / (DEEP * HIGH * WIDE)
