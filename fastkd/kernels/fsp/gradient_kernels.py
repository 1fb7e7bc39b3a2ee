"""The backward kernel of FSP; `fsp/gradient.py` says how it works, and launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.fsp.fields import (
    COARSE_TERMS,
    FINE_TERMS,
    FIRST_TERM,
    PARTS_D,
    PARTS_H,
    PARTS_W,
    TERM_KIND,
    TERM_VIEW,
    TILE_COLUMNS,
    TILE_ROWS,
)
from fastkd.kernels.fsp.low_rank import low_rank_term
from fastkd.kernels.fsp.term_kernels import recomputed_term, saved_term
from fastkd.kernels.fsp.tile import across, along, extent, part, sample, zeros


@triton.jit
def _any_term(
    total,
    ms,
    xs,
    m_numbers,
    views,
    n,
    row,
    rows,
    position,
    inside,
    j,
    scale,
    V: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Term T, of whichever kind. K[T]: see fsp/fields.py."""
    A: tl.constexpr = K[T][TERM_VIEW]
    if K[T][TERM_KIND] == 0:
        return saved_term(
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
    elif K[T][TERM_KIND] == 1:
        return low_rank_term(
            total,
            xs[A],
            xs[A + 1],
            ms[T],
            views[A],
            views[A + 1],
            views[A + 2],
            views[A + 3],
            m_numbers[T],
            n,
            row,
            rows,
            position,
            inside,
            j,
            scale,
            V,
            A,
            K,
            T,
            C,
            J,
            MODE,
            UPCAST,
        )
    else:
        return recomputed_term(
            total,
            ms[T],
            xs[A],
            xs[A + 1],
            xs[A + 2],
            xs[A + 3],
            xs[A + 4],
            m_numbers[T],
            views[A],
            views[A + 1],
            views[A + 2],
            views[A + 3],
            views[A + 4],
            n,
            row,
            rows,
            position,
            inside,
            j,
            scale,
            V,
            A,
            K,
            T,
            C,
            J,
            MODE,
            UPCAST,
        )


@triton.jit(do_not_specialize=["items", "samples"])
def fsp_gradient_kernel(
    grad,
    ms,
    xs,
    outs,
    m_numbers,
    views,
    out_views,
    items,
    scales,
    samples,
    V: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    ITEMS: tl.constexpr,
    MODE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Each item a feature's gradient. C[i]: (blocks..., first term, terms on the grid of the products, terms
    on the feature's own).
    """
    pid = tl.program_id(0)
    upstream = tl.full((), 1.0, tl.float32)
    if grad is not None:
        upstream = tl.load(grad).to(tl.float32)
    for i in tl.static_range(ITEMS):
        first_program, tiles, position_blocks = items[i]
        local = pid - first_program
        if (local >= 0) & (local < samples * tiles):
            n = (local // tiles).to(tl.int64)
            tile = local % tiles
            row = tile // position_blocks * C[i][TILE_ROWS] + tl.arange(0, C[i][TILE_ROWS])
            position = tile % position_blocks * C[i][TILE_COLUMNS] + tl.arange(0, C[i][TILE_COLUMNS])
            rows, length = extent(out_views[i], W, i)
            inside = position < length
            mask = (row < rows)[:, None] & inside[None, :]
            to = across(out_views[i], W, i, row)[:, None] + along(out_views[i], W, i, position)[None, :]
            FIRST: tl.constexpr = C[i][FIRST_TERM]
            COARSE: tl.constexpr = C[i][COARSE_TERMS]
            FINE: tl.constexpr = C[i][FINE_TERMS]
            coarse = zeros(row, position)
            for k in tl.static_range(COARSE):
                coarse = _any_term(
                    coarse,
                    ms,
                    xs,
                    m_numbers,
                    views,
                    n,
                    row,
                    rows,
                    position,
                    inside,
                    0,
                    scales[FIRST + k] * upstream,
                    V,
                    K,
                    FIRST + k,
                    C,
                    i,
                    MODE,
                    UPCAST,
                )
            # what lies in one pooling window shares the terms that were pooled
            for j in range(0, W[i][PARTS_D] * W[i][PARTS_H] * W[i][PARTS_W]):
                total = coarse
                for k in tl.static_range(FINE):
                    total = _any_term(
                        total,
                        ms,
                        xs,
                        m_numbers,
                        views,
                        n,
                        row,
                        rows,
                        position,
                        inside,
                        j,
                        scales[FIRST + COARSE + k] * upstream,
                        V,
                        K,
                        FIRST + COARSE + k,
                        C,
                        i,
                        MODE,
                        UPCAST,
                    )
                at = outs[i] + sample(out_views[i], W, i, n) + (to + part(out_views[i], W, i, j))
                tl.store(at, total.to(outs[i].dtype.element_ty), mask=mask)
