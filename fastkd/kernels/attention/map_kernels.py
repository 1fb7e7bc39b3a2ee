"""The kernels of the attention map; `attention/map.py` says how they work, and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.fields import TILE_LENGTH, TILE_ROWS
from fastkd.kernels.common.tile import (
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

# not specialized: a new size need not be a new kernel
_COUNTS = ["positions", "programs", "blocks", "steps", "parts"]


@triton.jit(do_not_specialize=_COUNTS)
def map_kernel(
    x,
    residual,
    y,
    out,
    norms,
    scratch,
    tickets,
    x_view,
    residual_view,
    y_view,
    positions,
    programs,
    blocks,
    steps,
    parts,
    divisor,
    CONFIG: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
):
    pid = tl.program_id(0)
    n = (pid // programs).to(tl.int64)
    mine = pid % programs
    sums = scratch + n * parts * positions
    sum_powers(
        x,
        x_view,
        n,
        mine % blocks,
        mine // blocks,
        steps,
        sums,
        CONFIG,
        0,
        y,
        y_view,
        residual,
        residual_view,
    )
    if tickets is None:
        tl.debug_barrier()
        last = n == n
    else:
        last = last_of(tickets + n, programs)
    if last:
        norm = tl.sqrt(collapse(sums, parts, positions, BLOCK)) / divisor
        reciprocal = tl.full((), 1.0, tl.float64) / divisor
        if NORMALIZE:
            tl.store(norms + n, norm.to(tl.float32))
            reciprocal = tl.full((), 1.0, tl.float64) / (normalization(norm, EPS, ADD_EPS)[0] * divisor)
        for first in range(0, positions, BLOCK):
            s = first + tl.arange(0, BLOCK)
            mask = s < positions
            tl.store(
                out + n * positions + s,
                normalized(tl.load(sums + s, mask=mask, other=0), reciprocal),
                mask=mask,
            )


@triton.jit(do_not_specialize=_COUNTS[:4])
def map_gradient_kernel(
    map_grad,
    grad,
    x,
    y,
    norms,
    out,
    x_view,
    grad_view,
    out_view,
    positions,
    programs,
    blocks,
    steps,
    gain,
    CONFIG: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    ADD_EPS: tl.constexpr,
    RELU: tl.constexpr,
):
    # what the forward pass has read last may still be in the second-level cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n = (pid // programs).to(tl.int64)
    mine = pid % programs
    ROWS: tl.constexpr = CONFIG[0][TILE_ROWS]
    LENGTH: tl.constexpr = CONFIG[0][TILE_LENGTH]
    rows_count, length = rows_of(x_view, CONFIG, 0)
    rows = tl.arange(0, ROWS)
    position = (mine % blocks) * LENGTH + tl.arange(0, LENGTH)
    inside = position < length
    own = n * positions + position % positions
    k = tl.load(map_grad + own, mask=inside, other=0)
    if NORMALIZE:
        dots = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, positions, BLOCK):
            s = first + tl.arange(0, BLOCK)
            at = n * positions + s
            dots += tl.load(map_grad + at, mask=s < positions, other=0).to(tl.float64) * tl.load(
                y + at, mask=s < positions, other=0
            )
        _, has_along, along, scale = normalization(tl.load(norms + n).to(tl.float64), EPS, ADD_EPS)
        k = along_gradient(
            k, tl.load(y + own, mask=inside, other=0), tl.sum(dots, 0), has_along, along, scale
        )
    k = (k.to(tl.float64) * gain).to(tl.float32)
    first = (mine // blocks) * steps * ROWS
    at = x + places(x_view, CONFIG, 0, n, first, rows, position)
    to = out + places(out_view, CONFIG, 0, n, first, rows, position)
    if grad is not None:
        grad_at = grad + places(grad_view, CONFIG, 0, n, first, rows, position)
    for row in range(first, tl.minimum(first + steps * ROWS, rows_count), ROWS):
        mask = (row + rows < rows_count)[:, None] & inside[None, :]
        v = tl.load(at, mask=mask, other=0).to(tl.float32)
        dx = slope(v, CONFIG, 0) * k[None, :]
        if grad is not None:
            dx += tl.load(grad_at, mask=mask, other=0).to(tl.float32)
            grad_at += row_step(grad_view, CONFIG, 0)
        if RELU:
            # a NaN lets pass, as in PyTorch
            dx = tl.where(v <= 0, 0.0, dx)
        tl.store(to, dx.to(out.dtype.element_ty), mask=mask)
        at += row_step(x_view, CONFIG, 0)
        to += row_step(out_view, CONFIG, 0)
