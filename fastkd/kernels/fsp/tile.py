"""What the FSP kernels have in common: blocks of features, averaged over pooling windows; products in each
precision; their difference.

V[J] is what of a view is constant, `gram_view.View.config`, ``view`` its numbers. Constants are handed down
whole: Triton 3.6 takes numbers out of tuples in a tuple, and nothing deeper, and passes no part of one on as
a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.jit
def zeros(rows, columns):
    """A sum of nothing for each row and column. Triton 3.6 makes no shape of parts of constants."""
    return tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)


@triton.jit
def extent(view, V: tl.constexpr, J: tl.constexpr):
    """The number of channels, and of positions of the grid of the products."""
    if V[J][1]:
        return view[0] * V[J][2], view[1]
    else:
        return view[0], view[1] * V[J][2]


@triton.jit
def sample(view, V: tl.constexpr, J: tl.constexpr, n):
    """Offset of sample n, in int64 as n is; offsets within a sample are so where it is that large: addresses
    take registers.
    """
    if V[J][0]:
        return n * view[4] * V[J][2]
    else:
        return n * view[4]


@triton.jit
def _offset(i, V: tl.constexpr, J: tl.constexpr):
    if V[J][10]:
        return tl.cast(i, tl.int64)
    else:
        return tl.cast(i, tl.int32)


@triton.jit
def across(view, V: tl.constexpr, J: tl.constexpr, row):
    """Offsets of channels ``row``."""
    if V[J][1]:
        return _offset(row, V, J)
    elif V[J][0]:
        return _offset(row, V, J) * view[5] * V[J][2]
    else:
        return _offset(row, V, J) * view[5]


@triton.jit
def along(view, V: tl.constexpr, J: tl.constexpr, position):
    """Offsets of positions, of each the first number of its window."""
    if V[J][1]:
        return _offset(position, V, J) * view[8] * V[J][2]
    elif V[J][0]:
        return _offset(position, V, J) * view[8]
    else:
        line = position // view[3]
        plane = _offset(line // view[2], V, J)
        return (
            plane * view[6]
            + _offset(line % view[2], V, J) * view[7]
            + _offset(position % view[3], V, J) * view[8]
        )


@triton.jit
def part(view, V: tl.constexpr, J: tl.constexpr, j):
    """Offset of the j-th of the numbers that lie at one position of a coarser grid."""
    j = _offset(j, V, J)
    d = j // (V[J][7] * V[J][8])
    h = j // V[J][8] % V[J][7]
    w = j % V[J][8]
    return d * view[12] + h * view[13] + w * view[14]


@triton.jit
def read(at, mask, view, V: tl.constexpr, J: tl.constexpr):
    """In float32, the average over the pooling window."""
    # a part of a constant is a constant only once it is named one
    DEEP: tl.constexpr = V[J][3]
    HIGH: tl.constexpr = V[J][4]
    WIDE: tl.constexpr = V[J][5]
    if DEEP * HIGH * WIDE == 1:
        return tl.load(at, mask=mask, other=0).to(tl.float32)
    else:
        total = tl.zeros(mask.shape, tl.float32)
        for d in tl.static_range(DEEP):
            for h in tl.static_range(HIGH):
                for w in tl.static_range(WIDE):
                    more = (
                        _offset(view[9], V, J) * d + _offset(view[10], V, J) * h + _offset(view[11], V, J) * w
                    )
                    total += tl.load(at + more, mask=mask, other=0).to(tl.float32)
        return total / (DEEP * HIGH * WIDE)


@triton.jit
def _low(x, high):
    """What bfloat16 ``high`` leaves of x; nothing of an infinity, whose difference to itself would be NaN."""
    wide = high.to(tl.float32)
    return tl.where(tl.abs(wide) < float("inf"), x - wide, 0.0).to(tl.bfloat16)


@triton.jit
def _narrow_product(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's product of bfloat16 is none
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _ten_bits(x, UPCAST: tl.constexpr):
    """x rounded to nearest as tf32 holds it: tensor cores cut off, all in one direction. A NaN stays.

    sm_90 and later round ties to even, in one instruction. Before, ties go away from zero: fewer operations.
    """
    if not UPCAST and cuda_capability_geq(9):
        bits = tl.inline_asm_elementwise(
            "cvt.rn.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )
        return bits.to(tl.float32, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    half = 0xFFF + (bits >> 13 & 1) if UPCAST else 0x1000  # the interpreter rounds as sm_90 does
    return tl.where(x == x, ((bits + half) & -0x2000).to(tl.float32, bitcast=True), x)


@triton.jit
def product(
    a, b, total, MODE: tl.constexpr, UPCAST: tl.constexpr, A_EXACT: tl.constexpr, B_EXACT: tl.constexpr
):
    """total + a b, of float32 blocks, in float32.

    MODE: see fsp/forward.py. "bf16": by bfloat16 products, of the high and the low part of what is not exact;
    that of the low parts is left out.
    """
    if MODE == "bf16":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        # the small terms first
        if not A_EXACT:
            total = _narrow_product(_low(a, a_high), b_high, total, UPCAST)
        if not B_EXACT:
            total = _narrow_product(a_high, _low(b, b_high), total, UPCAST)
        return _narrow_product(a_high, b_high, total, UPCAST)
    elif MODE == "tf32":
        return tl.dot(_ten_bits(a, UPCAST), _ten_bits(b, UPCAST), total, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=MODE)


@triton.jit
def product_apart(
    a,
    b,
    total,
    a_rest,
    b_rest,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
    A_EXACT: tl.constexpr,
    B_EXACT: tl.constexpr,
):
    """(total, a_rest, b_rest): their sum is what ``product`` makes; that of a low part has a tile of its own.

    Triton divides a tile that several products of a step are added to along its rows alone, and on sm_90 a
    tile of 64 rows has no parts for eight warps.
    """
    if MODE == "bf16":
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        if not A_EXACT:
            a_rest = _narrow_product(_low(a, a_high), b_high, a_rest, UPCAST)
        if not B_EXACT:
            b_rest = _narrow_product(a_high, _low(b, b_high), b_rest, UPCAST)
        return _narrow_product(a_high, b_high, total, UPCAST), a_rest, b_rest
    else:
        return product(a, b, total, MODE, UPCAST, A_EXACT, B_EXACT), a_rest, b_rest


@triton.jit
def products(
    total,
    a,
    b,
    a_less,
    b_less,
    a_view,
    b_view,
    a_less_view,
    b_less_view,
    n,
    row,
    column,
    V: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of a b^T over all positions; given a_less and b_less, of a b^T - a_less b_less^T, by way of the
    features' differences.

    V[A], V[A + 1] are constants of a and b, the next two of a_less and b_less. C[J]: (row block, column
    block, depth, ...).
    """
    # a part of a constant is a constant only once it is named one
    A_EXACT: tl.constexpr = V[A][9]
    B_EXACT: tl.constexpr = V[A + 1][9]
    rows, length = extent(a_view, V, A)
    columns, _ = extent(b_view, V, A + 1)
    k = tl.arange(0, C[J][2])
    own, other = row < rows, column < columns
    a += sample(a_view, V, A, n)
    b += sample(b_view, V, A + 1, n)
    a_rows = across(a_view, V, A, row)[:, None]
    b_rows = across(b_view, V, A + 1, column)[:, None]
    if a_less is not None:
        LESS_EXACT: tl.constexpr = V[A + 2][9]
        a_less += sample(a_less_view, V, A + 2, n)
        b_less += sample(b_less_view, V, A + 3, n)
        a_less_rows = across(a_less_view, V, A + 2, row)[:, None]
        b_less_rows = across(b_less_view, V, A + 3, column)[:, None]
    for first in range(0, length, C[J][2]):
        position = first + k
        inside = position < length
        a_mask = own[:, None] & inside[None, :]
        b_mask = other[:, None] & inside[None, :]
        x = read(a + (a_rows + along(a_view, V, A, position)[None, :]), a_mask, a_view, V, A)
        y = read(b + (b_rows + along(b_view, V, A + 1, position)[None, :]), b_mask, b_view, V, A + 1)
        if a_less is not None:
            x_less = read(
                a_less + (a_less_rows + along(a_less_view, V, A + 2, position)[None, :]),
                a_mask,
                a_less_view,
                V,
                A + 2,
            )
            y_less = read(
                b_less + (b_less_rows + along(b_less_view, V, A + 3, position)[None, :]),
                b_mask,
                b_less_view,
                V,
                A + 3,
            )
            total = product(x - x_less, tl.trans(y), total, MODE, UPCAST, False, B_EXACT)
            total = product(x_less, tl.trans(y - y_less), total, MODE, UPCAST, LESS_EXACT, False)
        else:
            total = product(x, tl.trans(y), total, MODE, UPCAST, A_EXACT, B_EXACT)
    return total


@triton.jit
def difference(
    a,
    b,
    a_less,
    b_less,
    a_view,
    b_view,
    a_less_view,
    b_less_view,
    n,
    row,
    column,
    positions,
    less_positions,
    V: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    SAME: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of a b^T / positions - a_less b_less^T / less_positions. SAME: the two are of one size."""
    total = zeros(row, column)
    if SAME:
        total = products(
            total,
            a,
            b,
            a_less,
            b_less,
            a_view,
            b_view,
            a_less_view,
            b_less_view,
            n,
            row,
            column,
            V,
            A,
            C,
            J,
            MODE,
            UPCAST,
        )
        return total / positions
    else:
        total = products(
            total, a, b, None, None, a_view, b_view, None, None, n, row, column, V, A, C, J, MODE, UPCAST
        )
        less = zeros(row, column)
        less = products(
            less,
            a_less,
            b_less,
            None,
            None,
            a_less_view,
            b_less_view,
            None,
            None,
            n,
            row,
            column,
            V,
            A + 2,
            C,
            J,
            MODE,
            UPCAST,
        )
        return total / positions - less / less_positions
