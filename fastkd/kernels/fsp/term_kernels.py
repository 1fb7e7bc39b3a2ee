"""Terms of a gradient of FSP: of a matrix that was saved, or of one that is computed again."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.fsp.fields import IS_EXACT, TERM_LEFT, TERM_SAME, TILE_DEPTH
from fastkd.kernels.fsp.products import difference, product
from fastkd.kernels.fsp.tile import across, along, extent, part, read, sample


@triton.jit
def saved_term(
    total,
    m,
    x,
    m_strides,
    view,
    n,
    row,
    rows,
    position,
    inside,
    j,
    scale,
    V: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + scale m x, summed over x's channels. m_strides: sample, channel of the gradient, of x."""
    EXACT: tl.constexpr = V[T][IS_EXACT]
    count, _ = extent(view, V, T)
    k = tl.arange(0, C[J][TILE_DEPTH])
    own = row < rows
    stride_n, stride_row, stride_channel = m_strides
    m_at = m + n * stride_n + row.to(tl.int64)[:, None] * stride_row
    x += sample(view, V, T, n)
    x_columns = (along(view, V, T, position) + part(view, V, T, j))[None, :]
    for first in range(0, count, C[J][TILE_DEPTH]):
        o = first + k
        given = o < count
        v = (
            tl.load(
                m_at + o.to(tl.int64)[None, :] * stride_channel, mask=own[:, None] & given[None, :], other=0
            ).to(tl.float32)
            * scale
        )
        y = read(
            x + (across(view, V, T, o)[:, None] + x_columns), given[:, None] & inside[None, :], view, V, T
        )
        total = product(v, y, total, MODE, UPCAST, False, EXACT)
    return total


@triton.jit
def recomputed_term(
    total,
    saved,
    x,
    a,
    b,
    a_less,
    b_less,
    numbers,
    x_view,
    a_view,
    b_view,
    a_less_view,
    b_less_view,
    n,
    row,
    rows,
    position,
    inside,
    j,
    scale,
    V: tl.constexpr,
    A: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """total + scale M x, of an M that was not saved: a b^T - a_less b_less^T, recomputed, times the columns'
    factors ``saved``.

    a: the student's feature whose gradient this is, or the teacher's is, and b the pair's other. numbers:
    strides of ``saved``, positions of student and teacher. V[A] is what is constant of x, the next of a, b,
    a_less, b_less. K[T]: see fsp/fields.py.
    """
    LEFT: tl.constexpr = K[T][TERM_LEFT]
    EXACT: tl.constexpr = V[A][IS_EXACT]
    SAME: tl.constexpr = K[T][TERM_SAME]
    count, _ = extent(x_view, V, A)
    k = tl.arange(0, C[J][TILE_DEPTH])
    stride_n, stride_channel, positions, less_positions = numbers
    saved += n * stride_n
    x += sample(x_view, V, A, n)
    x_columns = (along(x_view, V, A, position) + part(x_view, V, A, j))[None, :]
    for first in range(0, count, C[J][TILE_DEPTH]):
        o = first + k
        given = o < count
        m = difference(
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
            o,
            positions,
            less_positions,
            V,
            A + 1,
            C,
            J,
            SAME,
            MODE,
            UPCAST,
        )
        # an idle channel's product with an infinity is none
        m = tl.where(given[None, :], m, 0.0)
        if LEFT:
            m = m * tl.load(saved + o * stride_channel, mask=given, other=0)[None, :]
        else:
            m = m * tl.load(saved + row * stride_channel, mask=row < rows, other=0)[:, None]
        y = read(
            x + (across(x_view, V, A, o)[:, None] + x_columns), given[:, None] & inside[None, :], x_view, V, A
        )
        total = product(m * scale, y, total, MODE, UPCAST, False, EXACT)
    return total
