"""The kernels of FSP matrices and the FSP loss; `fsp/forward.py` says how they work together, and launches
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.tile import added_up, last_of
from fastkd.kernels.fsp.low_rank import dual_program, dual_term
from fastkd.kernels.fsp.tile import (
    across,
    along,
    difference,
    extent,
    part,
    product,
    products,
    read,
    sample,
    zeros,
)


# counts and places are not specialized, where Triton heeds that (not within tuples): a new batch size need
# not be a new kernel
@triton.jit(do_not_specialize=["tiles", "columns", "positions"])
def fsp_matrix_kernel(
    a,
    b,
    out,
    a_view,
    b_view,
    tiles,
    columns,
    positions,
    V: tl.constexpr,
    C: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    row = tile // columns * C[0][0] + tl.arange(0, C[0][0])
    column = tile % columns * C[0][1] + tl.arange(0, C[0][1])
    total = zeros(row, column)
    total = products(
        total, a, b, None, None, a_view, b_view, None, None, n, row, column, V, 0, C, 0, MODE, UPCAST
    )
    a_channels, _ = extent(a_view, V, 0)
    b_channels, _ = extent(b_view, V, 1)
    mask = (row < a_channels)[:, None] & (column < b_channels)[None, :]
    to = out + (n * a_channels + row)[:, None] * b_channels + column[None, :]
    tl.store(to, total / positions, mask=mask)


@triton.jit
def _matrix_program(
    operands, outs, scratch, tickets, factor, views, of, local, V: tl.constexpr, C: tl.constexpr, J: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of G_s - G_t and its share of the loss; whether that is complete. Kept is the tile as it is
    differentiated, or its factors.

    of: (first program, tiles of a sample, column tiles, where shares are, their number, where squares and
    tickets of columns are, positions). C[J]: (row block, column block, depth, whether features are
    subtracted, 0, whether factors of columns alone are kept).
    """
    FACTORS: tl.constexpr = C[J][5]
    n = (local // of[1]).to(tl.int64)
    tile = local % of[1]
    column_tile = tile % of[2]
    row = tile // of[2] * C[J][0] + tl.arange(0, C[J][0])
    column = column_tile * C[J][1] + tl.arange(0, C[J][1])
    d = difference(
        operands[4 * J], operands[4 * J + 1], operands[4 * J + 2], operands[4 * J + 3], views[4 * J], views[4 * J + 1],
        views[4 * J + 2], views[4 * J + 3], n, row, column, of[7], of[8], V, 4 * J, C, J, C[J][3], MODE, UPCAST,
    )  # fmt: skip
    a_channels, _ = extent(views[4 * J], V, 4 * J)
    b_channels, _ = extent(views[4 * J + 1], V, 4 * J + 1)
    mask = (row < a_channels)[:, None] & (column < b_channels)[None, :]
    # a sum over idle lanes must not meet 0 * NaN
    squares = tl.where(mask, d * d, 0.0)
    if outs is not None:
        if FACTORS:
            factors_to = outs[J] + n * b_channels + column
        else:
            to = outs[J] + (n * a_channels + row)[:, None] * b_channels + column[None, :]
    if COLUMNS:
        at = scratch + of[5] + n * (of[1] // of[2]) * b_channels + column
        tl.store(at + (tile // of[2]).to(tl.int64) * b_channels, tl.sum(squares, 0), mask=column < b_channels)
        if outs is not None and not FACTORS:
            tl.store(to, d, mask=mask)
        done = last_of(tickets + of[6] + n * of[2] + column_tile, of[1] // of[2])
        if done:
            # .cg: other multiprocessors wrote them
            sums = tl.zeros(column.shape, tl.float64)
            for k in range(0, of[1] // of[2]):
                more = tl.load(
                    at + tl.cast(k, tl.int64) * b_channels,
                    mask=column < b_channels,
                    other=0,
                    cache_modifier=".cg",
                )
                sums += more.to(tl.float64)
            norm = tl.sqrt(sums).to(tl.float32)
            tl.store(scratch + of[3] + n * of[2] + column_tile, tl.sum(norm, 0))
            if outs is not None:
                scale = tl.where(norm == 0, 0.0, factor / norm)
                if FACTORS:
                    tl.store(factors_to, scale, mask=column < b_channels)
                else:
                    for first in range(0, a_channels, C[J][0]):
                        row = first + tl.arange(0, C[J][0])
                        mask = (row < a_channels)[:, None] & (column < b_channels)[None, :]
                        to = outs[J] + (n * a_channels + row)[:, None] * b_channels + column[None, :]
                        tl.store(
                            to,
                            tl.load(to, mask=mask, other=0, cache_modifier=".cg") * scale[None, :],
                            mask=mask,
                        )
    else:
        tl.store(scratch + of[3] + local, tl.sum(squares))
        if outs is not None:
            if FACTORS:
                # by the sample's first row of tiles
                ours = tl.where(tile < of[2], b_channels, 0)
                tl.store(factors_to, tl.zeros(column.shape, tl.float32) + 2 * factor, mask=column < ours)
            else:
                tl.store(to, d * (2 * factor), mask=mask)
        done = local >= 0
    return done


@triton.jit(do_not_specialize=["pairs", "samples", "units"])
def fsp_loss_kernel(
    operands, outs, loss, scratch, tickets, factors, views, pairs, samples, units,
    V: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """operands and views: of each pair the student's first and second feature and the teacher's. A share is
    one number of the loss.
    """
    pid = tl.program_id(0)
    done = pid < 0
    for i in tl.static_range(PAIRS):
        local = pid - pairs[i][0]
        if (local >= 0) & (local < samples * pairs[i][1]):
            DUAL: tl.constexpr = C[i][3] == 2
            if DUAL:
                done = dual_program(
                    operands,
                    outs,
                    scratch,
                    tickets,
                    factors[i],
                    views,
                    pairs[i],
                    local,
                    V,
                    C,
                    i,
                    MODE,
                    UPCAST,
                )
            else:
                done = _matrix_program(
                    operands,
                    outs,
                    scratch,
                    tickets,
                    factors[i],
                    views,
                    pairs[i],
                    local,
                    V,
                    C,
                    i,
                    COLUMNS,
                    MODE,
                    UPCAST,
                )

    if done:  # noqa: SIM102 - an `and` would run both its sides
        if last_of(tickets, units):
            total = tl.full((), 0.0, tl.float64)
            for i in tl.static_range(PAIRS):
                total += added_up(scratch + pairs[i][3], pairs[i][4], BLOCK) * tl.cast(factors[i], tl.float64)
            tl.store(loss, total.to(tl.float32))


@triton.jit
def _term(
    total, m, x, m_strides, view, n, row, rows, position, inside, j, scale, V: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
    J: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total + scale m x, summed over the channels of x. m_strides: sample, channel of the gradient, channel
    of x.
    """
    EXACT: tl.constexpr = V[T][9]
    count, _ = extent(view, V, T)
    k = tl.arange(0, C[J][2])
    own = row < rows
    m_at = m + n * m_strides[0] + row.to(tl.int64)[:, None] * m_strides[1]
    x += sample(view, V, T, n)
    x_columns = (along(view, V, T, position) + part(view, V, T, j))[None, :]
    for first in range(0, count, C[J][2]):
        o = first + k
        given = o < count
        v = (
            tl.load(
                m_at + o.to(tl.int64)[None, :] * m_strides[2], mask=own[:, None] & given[None, :], other=0
            ).to(tl.float32)
            * scale
        )
        y = read(
            x + (across(view, V, T, o)[:, None] + x_columns), given[:, None] & inside[None, :], view, V, T
        )
        total = product(v, y, total, MODE, UPCAST, False, EXACT)
    return total


@triton.jit
def _recomputed_term(
    total, kept, x, a, b, a_less, b_less, numbers, x_view, a_view, b_view, a_less_view, b_less_view, n, row, rows, position, inside, j,
    scale, V: tl.constexpr, A: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr, J: tl.constexpr, MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """total + scale M x, of an M that was not kept: a b^T - a_less b_less^T, recomputed, times the columns'
    factors ``kept``.

    a: the student's feature whose gradient this is, or the teacher's is, and b the pair's other. numbers:
    strides of ``kept``, positions of student and teacher. V[A] is what is constant of x, the next of a, b,
    a_less, b_less. K[T]: (A, 2, LEFT, whether sizes are the same).
    """
    LEFT: tl.constexpr = K[T][2]
    EXACT: tl.constexpr = V[A][9]
    SAME: tl.constexpr = K[T][3]
    count, _ = extent(x_view, V, A)
    k = tl.arange(0, C[J][2])
    kept += n * numbers[0]
    x += sample(x_view, V, A, n)
    x_columns = (along(x_view, V, A, position) + part(x_view, V, A, j))[None, :]
    for first in range(0, count, C[J][2]):
        o = first + k
        given = o < count
        m = difference(
            a, b, a_less, b_less, a_view, b_view, a_less_view, b_less_view, n, row, o, numbers[2], numbers[3], V, A + 1, C, J, SAME, MODE,
            UPCAST,
        )  # fmt: skip
        # an idle channel's product with an infinity is none
        m = tl.where(given[None, :], m, 0.0)
        if LEFT:
            m = m * tl.load(kept + o * numbers[1], mask=given, other=0)[None, :]
        else:
            m = m * tl.load(kept + row * numbers[1], mask=row < rows, other=0)[:, None]
        y = read(
            x + (across(x_view, V, A, o)[:, None] + x_columns), given[:, None] & inside[None, :], x_view, V, A
        )
        total = product(m * scale, y, total, MODE, UPCAST, False, EXACT)
    return total


@triton.jit
def _any_term(
    total, ms, xs, m_numbers, views, n, row, rows, position, inside, j, scale, V: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, J: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """K[T]: (place of its first tensor and view, 0) or that of ``dual_term`` or ``_recomputed_term``."""
    A: tl.constexpr = K[T][0]
    if K[T][1] == 0:
        return _term(
            total,
            ms[T],
            xs[A],
            m_numbers[T],
            views[A],
            n,
            row,
            rows,
            position,
            inside,
            j,
            scale,
            V,
            A,
            C,
            J,
            MODE,
            UPCAST,
        )
    elif K[T][1] == 1:
        return dual_term(
            total, xs[A], xs[A + 1], ms[T], views[A], views[A + 1], views[A + 2], views[A + 3], m_numbers[T], n, row, rows, position,
            inside, j, scale, V, A, K, T, C, J, MODE, UPCAST,
        )  # fmt: skip
    else:
        return _recomputed_term(
            total, ms[T], xs[A], xs[A + 1], xs[A + 2], xs[A + 3], xs[A + 4], m_numbers[T], views[A], views[A + 1], views[A + 2],
            views[A + 3], views[A + 4], n, row, rows, position, inside, j, scale, V, A, K, T, C, J, MODE, UPCAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["items", "samples"])
def fsp_gradient_kernel(
    grad, ms, xs, outs, m_numbers, views, out_views, items, scales, samples,
    V: tl.constexpr, W: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ITEMS: tl.constexpr, MODE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Each item a feature's gradient. C[i]: (blocks..., first term, terms on the grid that is walked, terms
    on the feature's own).
    """
    pid = tl.program_id(0)
    upstream = tl.full((), 1.0, tl.float32)
    if grad is not None:
        upstream = tl.load(grad).to(tl.float32)
    for i in tl.static_range(ITEMS):
        # (first program, tiles of a sample, position blocks)
        of = items[i]
        local = pid - of[0]
        if (local >= 0) & (local < samples * of[1]):
            n = (local // of[1]).to(tl.int64)
            tile = local % of[1]
            row = tile // of[2] * C[i][0] + tl.arange(0, C[i][0])
            position = tile % of[2] * C[i][1] + tl.arange(0, C[i][1])
            rows, length = extent(out_views[i], W, i)
            inside = position < length
            mask = (row < rows)[:, None] & inside[None, :]
            to = across(out_views[i], W, i, row)[:, None] + along(out_views[i], W, i, position)[None, :]
            FIRST: tl.constexpr = C[i][3]
            COARSE: tl.constexpr = C[i][4]
            FINE: tl.constexpr = C[i][5]
            coarse = zeros(row, position)
            for k in tl.static_range(COARSE):
                coarse = _any_term(
                    coarse, ms, xs, m_numbers, views, n, row, rows, position, inside, 0, scales[FIRST + k] * upstream, V, K,
                    FIRST + k, C, i, MODE, UPCAST,
                )  # fmt: skip
            # what lies in one pooling window shares the terms that were pooled
            for j in range(0, W[i][6] * W[i][7] * W[i][8]):
                total = coarse
                for k in tl.static_range(FINE):
                    total = _any_term(
                        total, ms, xs, m_numbers, views, n, row, rows, position, inside, j, scales[FIRST + COARSE + k] * upstream, V, K,
                        FIRST + COARSE + k, C, i, MODE, UPCAST,
                    )  # fmt: skip
                at = outs[i] + sample(out_views[i], W, i, n) + (to + part(out_views[i], W, i, j))
                tl.store(at, total.to(outs[i].dtype.element_ty), mask=mask)
