"""Pairs of few positions and many channels, whose matrix would be larger than the features: products over
channels, K x K positions.

The difference of two FSP matrices has rank 2 K: K (G_s - G_t) = X0 Y0^T + X1 Y1^T with, of features (C, K),
X0 = A_s - A_t, X1 = A_t, Y0 = B_s, Y1 = B_s - B_t. With Pij = Xi^T Xj and Qij = Yi^T Yj, all of them sums
over channels,

    K^2 |G_s - G_t|^2 = <P00, Q00> + 2 <P01, Q01> + <P11, Q11>
    K (G_s - G_t) B_s   = X0 Q00 + X1 Q01^T
    K (G_s - G_t) B_t   = X0 (Q00 - Q01) + X1 (Q01^T - Q11)
    K (G_s - G_t)^T A_s = Y0 (P00 + P01) + Y1 (P01^T + P11)
    K (G_s - G_t)^T A_t = Y0 P01 + Y1 P11

since A_s = X0 + X1 and B_t = Y0 - Y1. Every term holds a difference of features as often as the result does,
made before anything is multiplied: near the teacher the loss is no difference of large numbers. It is
|u|^2 + 2 <u, v> + |v|^2 of u = X0 Y0^T and v = X1 Y1^T, so what rounding does is small beside |u|^2 + |v|^2.
It is not small beside |u + v|^2 where u and v cancel without being small themselves: where a student shrank
one feature and stretched the next by as much.

Saved are P00, P01, P11, Q00, Q01, Q11, in this order, times 2 factor / K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.tile import last_of
from fastkd.kernels.fsp.fields import (
    IS_EXACT,
    ONE_TILE,
    PART_CHANNELS,
    TERM_LEFT,
    TERM_SIGN,
    TILE_COLUMNS,
    TILE_DEPTH,
    TILE_ROWS,
)
from fastkd.kernels.fsp.products import product, product_apart
from fastkd.kernels.fsp.tile import across, along, extent, part, read, sample, zeros


@triton.jit
def channel_sums(
    s,
    t,
    s_view,
    t_view,
    n,
    k,
    other,
    begin,
    end,
    V: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    LEFT: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tiles (k, other) of P00, P01, P11 (LEFT) or Q00, Q01, Q11, summed over channels ``begin`` to ``end``.

    s and t: the feature of student and teacher; V[A], V[A + 2]: what is constant of them. C[J]:
    fsp/forward.py's of the pair.
    """
    X_EXACT: tl.constexpr = V[A][IS_EXACT] and not LEFT
    Y_EXACT: tl.constexpr = V[A + 2][IS_EXACT] and LEFT
    ONE: tl.constexpr = C[J][ONE_TILE]
    # with two, three products of three parts each leave too few registers unless blocks are of depth 8
    STAGES: tl.constexpr = 1 if MODE == "tf32x3" and C[J][TILE_DEPTH] > 8 else None
    channels, positions = extent(s_view, V, A)
    s += sample(s_view, V, A, n)
    t += sample(t_view, V, A + 2, n)
    c = tl.arange(0, C[J][TILE_DEPTH])
    zero = zeros(k, other)
    sum00, left00, right00 = zero, zero, zero
    sum01, left01, right01 = zero, zero, zero
    sum11, left11, right11 = zero, zero, zero
    for first in tl.range(begin, tl.minimum(end, channels), C[J][TILE_DEPTH], num_stages=STAGES):
        channel = first + c
        own = (channel < channels)[:, None]
        s_rows = across(s_view, V, A, channel)[:, None]
        t_rows = across(t_view, V, A + 2, channel)[:, None]
        mask = own & (k < positions)[None, :]
        x = read(s + (s_rows + along(s_view, V, A, k)[None, :]), mask, s_view, V, A)
        y = read(t + (t_rows + along(t_view, V, A + 2, k)[None, :]), mask, t_view, V, A + 2)
        if LEFT:
            x, y = x - y, y
        else:
            x, y = x, x - y
        if ONE:
            other_x, other_y = x, y
        else:
            mask = own & (other < positions)[None, :]
            other_x = read(s + (s_rows + along(s_view, V, A, other)[None, :]), mask, s_view, V, A)
            other_y = read(t + (t_rows + along(t_view, V, A + 2, other)[None, :]), mask, t_view, V, A + 2)
            if LEFT:
                other_x, other_y = other_x - other_y, other_y
            else:
                other_x, other_y = other_x, other_x - other_y
        sum00, left00, right00 = product_apart(
            tl.trans(x), other_x, sum00, left00, right00, MODE, UPCAST, X_EXACT, X_EXACT
        )
        sum01, left01, right01 = product_apart(
            tl.trans(x), other_y, sum01, left01, right01, MODE, UPCAST, X_EXACT, Y_EXACT
        )
        sum11, left11, right11 = product_apart(
            tl.trans(y), other_y, sum11, left11, right11, MODE, UPCAST, Y_EXACT, Y_EXACT
        )
    return left00 + right00 + sum00, left01 + right01 + sum01, left11 + right11 + sum11


@triton.jit
def _written(at, sum00, sum01, sum11, place, SIZE: tl.constexpr):
    tl.store(at + place, sum00)
    tl.store(at + SIZE + place, sum01)
    tl.store(at + 2 * SIZE + place, sum11)


@triton.jit
def _added(at, parts, STEP: tl.constexpr):
    """The sum of ``parts`` tiles, in order; .cg: other multiprocessors wrote them."""
    total = tl.load(at, cache_modifier=".cg")
    for i in range(1, parts):
        total += tl.load(at + i * STEP, cache_modifier=".cg")
    return total


@triton.jit
def low_rank_program(
    operands,
    outs,
    scratch,
    tickets,
    factor,
    views,
    of,
    local,
    V: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile's sums over a part of the channels of A or of B. The last of a tile's programs adds them, keeps
    them and writes the tile's share of the loss; whether this was the last.

    of: (first program, programs of a sample, column tiles, where shares are, their number, where sums (by 32)
    and tickets are, positions, parts of A). C[J]: (row block, column block, depth, 2, channels of a part,
    whether one square tile is all).
    """
    _, programs, column_tiles, shares_at, _, sums_at, tickets_at, positions, left_parts = of
    HIGH: tl.constexpr = C[J][TILE_ROWS]
    WIDE: tl.constexpr = C[J][TILE_COLUMNS]
    SIZE: tl.constexpr = HIGH * WIDE
    CHANNELS: tl.constexpr = C[J][PART_CHANNELS]
    n = (local // programs).to(tl.int64)
    tiles = (positions + HIGH - 1) // HIGH * column_tiles
    tile = local % programs % tiles
    i = local % programs // tiles
    parts = programs // tiles
    row = tl.arange(0, HIGH)
    column = tl.arange(0, WIDE)
    place = row[:, None] * WIDE + column[None, :]
    k = tile // column_tiles * HIGH + row
    other = tile % column_tiles * WIDE + column
    at = scratch + tl.cast(sums_at, tl.int64) * 32 + (n * tiles + tile) * parts * (3 * SIZE)
    if i < left_parts:
        sum00, sum01, sum11 = channel_sums(
            operands[4 * J],
            operands[4 * J + 2],
            views[4 * J],
            views[4 * J + 2],
            n,
            k,
            other,
            i * CHANNELS,
            (i + 1) * CHANNELS,
            V,
            4 * J,
            C,
            J,
            True,
            MODE,
            UPCAST,
        )
        _written(at + i * (3 * SIZE), sum00, sum01, sum11, place, SIZE)
    else:
        first = (i - left_parts) * CHANNELS
        sum00, sum01, sum11 = channel_sums(
            operands[4 * J + 1],
            operands[4 * J + 3],
            views[4 * J + 1],
            views[4 * J + 3],
            n,
            k,
            other,
            first,
            first + CHANNELS,
            V,
            4 * J + 1,
            C,
            J,
            False,
            MODE,
            UPCAST,
        )
        _written(at + i * (3 * SIZE), sum00, sum01, sum11, place, SIZE)

    done = last_of(tickets + tickets_at + n * tiles + tile, parts)
    if done:
        total = tl.full((), 0.0, tl.float64)
        for j in tl.static_range(3):
            p = _added(at + j * SIZE + place, left_parts, 3 * SIZE)
            q = _added(at + left_parts * (3 * SIZE) + j * SIZE + place, parts - left_parts, 3 * SIZE)
            total += tl.sum(p.to(tl.float64) * q.to(tl.float64)) * (2 if j == 1 else 1)
            if outs is not None:
                scale = 2 * factor / positions
                mask = (k < positions)[:, None] & (other < positions)[None, :]
                to = outs[J] + ((6 * n + j) * positions + k[:, None]) * positions + other[None, :]
                tl.store(to, p * scale, mask=mask)
                tl.store(to + 3 * positions * positions, q * scale, mask=mask)
        tl.store(scratch + shares_at + n * tiles + tile, (total / positions / positions).to(tl.float32))
    return done


@triton.jit
def low_rank_term(
    total,
    s,
    t,
    saved,
    s_view,
    t_view,
    view,
    turned,
    offsets,
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
    """total + scale (X0 M0 + X1 M1^T), summed over positions; X as above of s and t, M0 and M1 a saved square
    or two neighbours' sum.

    V[A] and the next three are what is constant of s, t and a saved square, as it is and transposed; offsets:
    where M0 begins and from one square to the next. K[T]: see fsp/fields.py.
    """
    LEFT: tl.constexpr = K[T][TERM_LEFT]
    SIGN: tl.constexpr = K[T][TERM_SIGN]
    X_EXACT: tl.constexpr = V[A][IS_EXACT] and not LEFT
    Y_EXACT: tl.constexpr = V[A + 1][IS_EXACT] and LEFT
    count, _ = extent(view, V, A + 2)
    i = tl.arange(0, C[J][TILE_DEPTH])
    own = row < rows
    s += sample(s_view, V, A, n)
    t += sample(t_view, V, A + 1, n)
    s_rows = across(s_view, V, A, row)[:, None]
    t_rows = across(t_view, V, A + 1, row)[:, None]
    first_square, next_square = offsets
    saved += sample(view, V, A + 2, n) + first_square
    columns = (along(view, V, A + 2, position) + part(view, V, A + 2, j))[None, :]
    turned_columns = (along(turned, V, A + 3, position) + part(turned, V, A + 3, j))[None, :]
    for first in range(0, count, C[J][TILE_DEPTH]):
        o = first + i
        given = o < count
        mask = own[:, None] & given[None, :]
        x = read(s + (s_rows + along(s_view, V, A, o)[None, :]), mask, s_view, V, A)
        y = read(t + (t_rows + along(t_view, V, A + 1, o)[None, :]), mask, t_view, V, A + 1)
        if LEFT:
            x, y = x - y, y
        else:
            x, y = x, x - y
        mask = given[:, None] & inside[None, :]
        at = saved + (across(view, V, A + 2, o)[:, None] + columns)
        turned_at = saved + next_square + (across(turned, V, A + 3, o)[:, None] + turned_columns)
        m0 = tl.load(at, mask=mask, other=0)
        m1 = tl.load(turned_at, mask=mask, other=0)
        if SIGN != 0:
            m0 += SIGN * tl.load(at + next_square, mask=mask, other=0)
            m1 += SIGN * tl.load(turned_at + next_square, mask=mask, other=0)
        total = product(x, m0 * scale, total, MODE, UPCAST, X_EXACT, False)
        total = product(y, m1 * scale, total, MODE, UPCAST, Y_EXACT, False)
    return total
