"""The kernels of the attention-transfer loss; `attention/loss.py` says how they work, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.fields import TILE_LENGTH, TILE_ROWS
from fastkd.kernels.common.tile import (
    added_up,
    along_gradient,
    collapse,
    last_of,
    normalization,
    normalized,
    places,
    row_step,
    rows_of,
    slope,
    sum_powers,
)


@triton.jit
def _write_coefficients(
    out, n, s, positions, mask, d, y, dot, has_along, along, scale, factor, IS_MAP: tl.constexpr
):
    k = d.to(tl.float64) * factor if IS_MAP else along_gradient(d, y, dot, has_along, along, scale * factor)
    tl.store(out + n * positions + s, k.to(tl.float32), mask=mask)


# counts and places are not specialized, where Triton heeds that (not within tuples): a new batch size need
# not be a new kernel
@triton.jit(do_not_specialize=["stages", "samples", "distances_at"])
def loss_kernel(
    students,
    teachers,
    s_out,
    t_out,
    loss,
    scratch,
    tickets,
    factors,
    s_views,
    t_views,
    stages,
    gains,
    samples,
    distances_at,
    S_CONFIG: tl.constexpr,
    T_CONFIG: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
    L2: tl.constexpr,
    S_MAP: tl.constexpr,
    T_MAP: tl.constexpr,
):
    pid = tl.program_id(0)
    n = tl.full((), 0, tl.int64)
    stage = tl.full((), 0, tl.int32)
    positions = tl.full((), 0, tl.int32)
    programs = tl.full((), 0, tl.int32)
    s_parts = tl.full((), 0, tl.int32)
    t_parts = tl.full((), 0, tl.int32)
    s_at = tl.full((), 0, tl.int64)
    t_at = tl.full((), 0, tl.int64)
    s_div = tl.full((), 1.0, tl.float32)
    t_div = tl.full((), 1.0, tl.float32)
    s_gain = tl.full((), 1.0, tl.float32)
    t_gain = tl.full((), 1.0, tl.float32)
    factor = tl.full((), 0.0, tl.float32)
    if s_out is not None:
        s_coefficients = s_out[0]
    if t_out is not None:
        t_coefficients = t_out[0]
    for i in tl.static_range(STAGES):
        # the program that begins the stage, and its positions; of each side its programs of a sample, blocks,
        # steps and parts, and where its sums begin
        begin, count, s_own, s_blocks, s_steps, s_of, s_begin, t_own, t_blocks, t_steps, t_of, t_begin = (
            stages[i]
        )
        local = pid - begin
        each = s_own + t_own
        if (local >= 0) & (local < samples * each):
            n = (local // each).to(tl.int64)
            stage = tl.full((), i, tl.int32)
            positions = tl.full((), 0, tl.int32) + count
            programs = tl.full((), 0, tl.int32) + each
            s_parts = tl.full((), 0, tl.int32) + s_of
            t_parts = tl.full((), 0, tl.int32) + t_of
            s_at = s_begin + n * s_parts * positions
            t_at = t_begin + n * t_parts * positions
            s_div, s_gain, t_div, t_gain = gains[i]
            factor = factors[i]
            if s_out is not None:
                s_coefficients = s_out[i]
            if t_out is not None:
                t_coefficients = t_out[i]
            mine = local % each
            if mine < s_own:
                sum_powers(
                    students[i],
                    s_views[i],
                    n,
                    mine % s_blocks,
                    mine // s_blocks,
                    s_steps,
                    scratch + s_at,
                    S_CONFIG,
                    i,
                    # the backward pass reads again what a gradient is wanted of
                    ONCE=s_out is None,
                )
            else:
                mine -= s_own
                sum_powers(
                    teachers[i],
                    t_views[i],
                    n,
                    mine % t_blocks,
                    mine // t_blocks,
                    t_steps,
                    scratch + t_at,
                    T_CONFIG,
                    i,
                    ONCE=t_out is None,
                )

    if last_of(tickets + 1 + stage * samples + n, programs):
        s_norm = tl.sqrt(collapse(scratch + s_at, s_parts, positions, BLOCK)) / s_div
        t_norm = tl.sqrt(collapse(scratch + t_at, t_parts, positions, BLOCK)) / t_div
        s_divisor, s_has, s_along, s_scale = normalization(s_norm, EPS, ADD_EPS)
        t_divisor, t_has, t_along, t_scale = normalization(t_norm, EPS, ADD_EPS)
        one = tl.full((), 1.0, tl.float64)
        s_reciprocal = one if S_MAP else one / (s_divisor * s_div)
        t_reciprocal = one if T_MAP else one / (t_divisor * t_div)
        squares = tl.zeros((BLOCK,), tl.float64)
        s_dot = tl.zeros((BLOCK,), tl.float64)
        t_dot = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, positions, BLOCK):
            s = first + tl.arange(0, BLOCK)
            mask = s < positions
            y_s = normalized(tl.load(scratch + s_at + s, mask=mask, other=0), s_reciprocal).to(tl.float64)
            y_t = normalized(tl.load(scratch + t_at + s, mask=mask, other=0), t_reciprocal).to(tl.float64)
            # a sum over idle lanes must not meet 0 * NaN
            d = tl.where(mask, y_s - y_t, 0.0)
            squares += d * d
            s_dot += d * tl.where(mask, y_s, 0.0)
            t_dot += d * tl.where(mask, y_t, 0.0)
        distance = tl.sum(squares, 0)
        along_s = tl.sum(s_dot, 0)
        along_t = tl.sum(t_dot, 0)
        if L2:
            distance = tl.sqrt(distance)
            change = tl.where(distance == 0, 0.0, tl.cast(factor, tl.float64) / distance)
        else:
            change = 2 * tl.cast(factor, tl.float64)
        if s_out is not None or t_out is not None:
            for first in range(0, positions, BLOCK):
                s = first + tl.arange(0, BLOCK)
                mask = s < positions
                y_s = normalized(tl.load(scratch + s_at + s, mask=mask, other=0), s_reciprocal)
                y_t = normalized(tl.load(scratch + t_at + s, mask=mask, other=0), t_reciprocal)
                d = y_s - y_t
                if s_out is not None:
                    _write_coefficients(
                        s_coefficients,
                        n,
                        s,
                        positions,
                        mask,
                        d,
                        y_s,
                        along_s,
                        s_has,
                        s_along,
                        s_scale,
                        change * s_gain,
                        S_MAP,
                    )
                if t_out is not None:
                    _write_coefficients(
                        t_coefficients,
                        n,
                        s,
                        positions,
                        mask,
                        d,
                        y_t,
                        along_t,
                        t_has,
                        t_along,
                        t_scale,
                        -change * t_gain,
                        T_MAP,
                    )
        tl.store(scratch + distances_at + stage * samples + n, distance.to(tl.float32))

        if last_of(tickets, STAGES * samples):
            total = tl.full((), 0.0, tl.float64)
            for i in tl.static_range(STAGES):
                total += added_up(scratch + distances_at + i * samples, samples, BLOCK) * tl.cast(
                    factors[i], tl.float64
                )
            tl.store(loss, total.to(tl.float32))


@triton.jit(do_not_specialize=["items", "samples"])
def gradient_kernel(
    grad,
    xs,
    coefficients,
    outs,
    x_views,
    out_views,
    items,
    samples,
    CONFIG: tl.constexpr,
    ITEMS: tl.constexpr,
):
    # what the forward pass has read last may still be in the second-level cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    upstream = tl.load(grad).to(tl.float32)
    for i in tl.static_range(ITEMS):
        begin, programs, blocks, steps, positions = items[i]  # programs of a sample
        local = pid - begin
        if (local >= 0) & (local < samples * programs):
            n = (local // programs).to(tl.int64)
            mine = local % programs
            ROWS: tl.constexpr = CONFIG[i][TILE_ROWS]
            BLOCK: tl.constexpr = CONFIG[i][TILE_LENGTH]
            rows_count, length = rows_of(x_views[i], CONFIG, i)
            rows = tl.arange(0, ROWS)
            position = (mine % blocks) * BLOCK + tl.arange(0, BLOCK)
            inside = position < length
            k = (
                tl.load(coefficients[i] + n * positions + position % positions, mask=inside, other=0)
                * upstream
            )
            first = (mine // blocks) * steps * ROWS
            at = xs[i] + places(x_views[i], CONFIG, i, n, first, rows, position)
            to = outs[i] + places(out_views[i], CONFIG, i, n, first, rows, position)
            for row in range(first, tl.minimum(first + steps * ROWS, rows_count), ROWS):
                mask = (row + rows < rows_count)[:, None] & inside[None, :]
                x = tl.load(at, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
                tl.store(to, (slope(x, CONFIG, i) * k[None, :]).to(outs[i].dtype.element_ty), mask=mask)
                at += row_step(x_views[i], CONFIG, i)
                to += row_step(out_views[i], CONFIG, i)
