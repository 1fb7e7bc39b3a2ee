"""RKD's kernel of gradients; `rkd/loss.py` says how it works."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.tile import added_up


@triton.jit
def _gradient(
    x,
    grad,
    matrix,
    inverses,
    sums,
    factor,
    shape,
    grad_shape,
    mine,
    programs,
    count,
    pitch,
    tiles,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    DEPTH: tl.constexpr,
    ADDED: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """The sum over k of matrix[i, k] (x_i - x_k), for a block of i and of numbers: program ``mine`` of so
    many, if it is one of them.
    """
    if (mine >= 0) & (mine < programs):
        width, row_stride, stride = shape
        grad_row, grad_stride = grad_shape
        columns = tl.cdiv(width, DEPTH)
        i = (mine // columns * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        d = (mine % columns * DEPTH + tl.arange(0, DEPTH)).to(tl.int64)
        if DISTANCE:
            through = factor * added_up(sums, tiles, ADDED)
        inside = (i < count)[:, None] & (d < width)[None, :]
        own = tl.load(x + i[:, None] * row_stride + d[None, :] * stride, mask=inside, other=0)
        own = own.to(tl.float32).to(tl.float64)[None, :, :]
        total = tl.zeros((RUN, BLOCK, DEPTH), tl.float64)
        for first in range(0, count, RUN):
            k = (first + tl.arange(0, RUN)).to(tl.int64)
            there = (k < count)[:, None] & (d < width)[None, :]
            other = tl.load(x + k[:, None] * row_stride + d[None, :] * stride, mask=there, other=0)
            pull = tl.load(matrix + k[:, None] * pitch + i[None, :])
            if DISTANCE:
                pull -= through * tl.load(inverses + k[:, None] * pitch + i[None, :]).to(tl.float64)
            apart = own - other.to(tl.float32).to(tl.float64)[:, None, :]
            total = tl.fma(pull[:, :, None], apart, total)
        out = grad + i[:, None] * grad_row + d[None, :] * grad_stride
        tl.store(out, tl.sum(total, 0).to(tl.float32), mask=inside)


# counts are not specialized: a new batch size need not be a new kernel
@triton.jit(do_not_specialize=["count", "blocks", "pair_tiles", "tiles", "s_programs", "t_programs"])
def rkd_gradient_kernel(
    s,
    t,
    scratch,
    inverses,
    s_matrix,
    t_matrix,
    loss,
    s_grad,
    t_grad,
    distance_factor,
    s_shape,
    t_shape,
    s_grad_shape,
    t_grad_shape,
    count,
    blocks,
    pair_tiles,
    tiles,
    s_programs,
    t_programs,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    S_DEPTH: tl.constexpr,
    T_DEPTH: tl.constexpr,
    ADDED: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """``pair_tiles`` and ``tiles``: in how many numbers each sum of the lengths and of the triples is: 1
    where those have been added up.
    """
    pid = tl.program_id(0)
    pitch = tl.cast(blocks * BLOCK, tl.int64)
    parts = scratch + 4 * pair_tiles
    factor = 2 * tl.cast(distance_factor, tl.float64)
    if pid == 0:
        tl.store(loss, added_up(parts, tiles, ADDED).to(tl.float32))
    if s_grad is not None:
        _gradient(
            s,
            s_grad,
            s_matrix,
            inverses,
            parts + tiles,
            factor,
            s_shape,
            s_grad_shape,
            pid,
            s_programs,
            count,
            pitch,
            tiles,
            BLOCK,
            RUN,
            S_DEPTH,
            ADDED,
            DISTANCE,
        )
    if t_grad is not None:
        _gradient(
            t,
            t_grad,
            t_matrix,
            inverses + pitch * pitch,
            parts + 2 * tiles,
            -factor,
            t_shape,
            t_grad_shape,
            pid - s_programs,
            t_programs,
            count,
            pitch,
            tiles,
            BLOCK,
            RUN,
            T_DEPTH,
            ADDED,
            DISTANCE,
        )
