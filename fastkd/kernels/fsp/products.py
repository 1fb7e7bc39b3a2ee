"""Products of blocks of features in each precision, and the difference of two of them."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from fastkd.kernels.fsp.fields import IS_EXACT, TILE_DEPTH
from fastkd.kernels.fsp.tile import across, along, extent, read, sample, zeros


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
    A_EXACT: tl.constexpr = V[A][IS_EXACT]
    B_EXACT: tl.constexpr = V[A + 1][IS_EXACT]
    rows, length = extent(a_view, V, A)
    # of as many positions; each mask by its own feature's number, whose known factors make loads wide
    columns, other_length = extent(b_view, V, A + 1)
    k = tl.arange(0, C[J][TILE_DEPTH])
    own, other = row < rows, column < columns
    a += sample(a_view, V, A, n)
    b += sample(b_view, V, A + 1, n)
    a_rows = across(a_view, V, A, row)[:, None]
    b_rows = across(b_view, V, A + 1, column)[:, None]
    if a_less is not None:
        LESS_EXACT: tl.constexpr = V[A + 2][IS_EXACT]
        a_less += sample(a_less_view, V, A + 2, n)
        b_less += sample(b_less_view, V, A + 3, n)
        a_less_rows = across(a_less_view, V, A + 2, row)[:, None]
        b_less_rows = across(b_less_view, V, A + 3, column)[:, None]
    for first in range(0, length, C[J][TILE_DEPTH]):
        position = first + k
        a_mask = own[:, None] & (position < length)[None, :]
        b_mask = other[:, None] & (position < other_length)[None, :]
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
