"""The forward kernels of FSP; `fsp/forward.py` says how they work together, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.tile import added_up, last_of
from fastkd.kernels.fsp.fields import (
    FACTORS_ALONE,
    FIRST_PROGRAM,
    KIND,
    PROGRAMS,
    SHARES,
    SHARES_AT,
    TILE_COLUMNS,
    TILE_ROWS,
)
from fastkd.kernels.fsp.low_rank import low_rank_program
from fastkd.kernels.fsp.products import difference, products
from fastkd.kernels.fsp.tile import extent, zeros


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
    row = tile // columns * C[0][TILE_ROWS] + tl.arange(0, C[0][TILE_ROWS])
    column = tile % columns * C[0][TILE_COLUMNS] + tl.arange(0, C[0][TILE_COLUMNS])
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
    COLUMNS: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of G_s - G_t and its share of the loss; whether that is complete. Saves dloss/dG of the tile,
    or its factors.

    of: (first program, tiles of a sample, column tiles, where shares are, their number, where squares and
    tickets of columns are, positions). C[J]: (row block, column block, depth, whether features are
    subtracted, 0, whether factors of columns alone are saved).
    """
    _, tiles, column_tiles, shares_at, _, squares_at, tickets_at, s_positions, t_positions = of
    FACTORS: tl.constexpr = C[J][FACTORS_ALONE]
    n = (local // tiles).to(tl.int64)
    tile = local % tiles
    column_tile = tile % column_tiles
    row = tile // column_tiles * C[J][TILE_ROWS] + tl.arange(0, C[J][TILE_ROWS])
    column = column_tile * C[J][TILE_COLUMNS] + tl.arange(0, C[J][TILE_COLUMNS])
    d = difference(
        operands[4 * J],
        operands[4 * J + 1],
        operands[4 * J + 2],
        operands[4 * J + 3],
        views[4 * J],
        views[4 * J + 1],
        views[4 * J + 2],
        views[4 * J + 3],
        n,
        row,
        column,
        s_positions,
        t_positions,
        V,
        4 * J,
        C,
        J,
        C[J][KIND],
        MODE,
        UPCAST,
    )
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
        at = scratch + squares_at + n * (tiles // column_tiles) * b_channels + column
        tl.store(
            at + (tile // column_tiles).to(tl.int64) * b_channels,
            tl.sum(squares, 0),
            mask=column < b_channels,
        )
        if outs is not None and not FACTORS:
            tl.store(to, d, mask=mask)
        done = last_of(tickets + tickets_at + n * column_tiles + column_tile, tiles // column_tiles)
        if done:
            # .cg: other multiprocessors wrote them
            sums = tl.zeros(column.shape, tl.float64)
            for k in range(0, tiles // column_tiles):
                more = tl.load(
                    at + tl.cast(k, tl.int64) * b_channels,
                    mask=column < b_channels,
                    other=0,
                    cache_modifier=".cg",
                )
                sums += more.to(tl.float64)
            norm = tl.sqrt(sums).to(tl.float32)
            tl.store(scratch + shares_at + n * column_tiles + column_tile, tl.sum(norm, 0))
            if outs is not None:
                scale = tl.where(norm == 0, 0.0, factor / norm)
                if FACTORS:
                    tl.store(factors_to, scale, mask=column < b_channels)
                else:
                    for first in range(0, a_channels, C[J][TILE_ROWS]):
                        row = first + tl.arange(0, C[J][TILE_ROWS])
                        mask = (row < a_channels)[:, None] & (column < b_channels)[None, :]
                        to = outs[J] + (n * a_channels + row)[:, None] * b_channels + column[None, :]
                        tl.store(
                            to,
                            tl.load(to, mask=mask, other=0, cache_modifier=".cg") * scale[None, :],
                            mask=mask,
                        )
    else:
        tl.store(scratch + shares_at + local, tl.sum(squares))
        if outs is not None:
            if FACTORS:
                # by the sample's first row of tiles
                ours = tl.where(tile < column_tiles, b_channels, 0)
                tl.store(factors_to, tl.zeros(column.shape, tl.float32) + 2 * factor, mask=column < ours)
            else:
                tl.store(to, d * (2 * factor), mask=mask)
        done = local >= 0
    return done


@triton.jit(do_not_specialize=["pairs", "samples", "units"])
def fsp_loss_kernel(
    operands,
    outs,
    loss,
    scratch,
    tickets,
    factors,
    views,
    pairs,
    samples,
    units,
    V: tl.constexpr,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """operands and views: of each pair the student's first and second feature and the teacher's. A share is
    one number of the loss.
    """
    pid = tl.program_id(0)
    done = pid < 0
    for i in tl.static_range(PAIRS):
        local = pid - pairs[i][FIRST_PROGRAM]
        if (local >= 0) & (local < samples * pairs[i][PROGRAMS]):
            LOW_RANK: tl.constexpr = C[i][KIND] == 2
            if LOW_RANK:
                done = low_rank_program(
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
                total += added_up(scratch + pairs[i][SHARES_AT], pairs[i][SHARES], BLOCK) * tl.cast(
                    factors[i], tl.float64
                )
            tl.store(loss, total.to(tl.float32))
