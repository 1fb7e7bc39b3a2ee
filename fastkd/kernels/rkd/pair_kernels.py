"""RKD's kernel of lengths, and what it shares with that of triples; `rkd/loss.py` says how they work.

Matrices over pairs are dense and symmetric, (pitch, pitch) with pitch = blocks * BLOCK rows; what lies beyond
the batch is zero, so that it needs no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, blocks):
    """(row, column) of a tile on or above the diagonal: rows r and blocks - 1 - r (blocks - r if that is odd)
    share a line of tiles, so that a division finds it.
    """
    shift = 1 - blocks % 2
    line = pid // (blocks + shift)
    at = pid % (blocks + shift)
    lower = at < line + shift
    return tl.where(lower, blocks - shift - line, line), tl.where(lower, blocks - 1 - at, at - shift)


@triton.jit
def _half_squares(x, shape, i, k, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """|x_i - x_k|^2 / 2, by differences in float64, which are exact."""
    width, row_stride, stride = shape
    d = tl.arange(0, DEPTH).to(tl.int64)
    own = x + i.to(tl.int64)[:, None, None] * row_stride
    other = x + k.to(tl.int64)[None, :, None] * row_stride
    total = tl.zeros((BLOCK, BLOCK, DEPTH), tl.float64)
    for first in range(0, width, DEPTH):
        at = (first + d)[None, None, :]
        a = tl.load(own + at * stride, mask=(i < count)[:, None, None] & (at < width), other=0)
        b = tl.load(other + at * stride, mask=(k < count)[None, :, None] & (at < width), other=0)
        apart = a.to(tl.float32).to(tl.float64) - b.to(tl.float32).to(tl.float64)
        total = tl.fma(apart, apart, total)
    return 0.5 * tl.sum(total, 2)


@triton.jit
def put(matrix, place, mirrored, value):
    """Both of a pair, in a symmetric matrix. On the diagonal the same numbers meet in one place."""
    tl.store(matrix + place, value)
    tl.store(matrix + mirrored, value)


# counts are not specialized: a new batch size need not be a new kernel. (Shapes and places are, by whether
# they divide by 16)
@triton.jit(do_not_specialize=["count", "blocks"])
def rkd_pairs_kernel(
    s,
    t,
    scratch,
    inverses,
    s_shape,
    t_shape,
    halves_at,
    count,
    blocks,
    BLOCK: tl.constexpr,
    S_DEPTH: tl.constexpr,
    T_DEPTH: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = blocks * (blocks + 1) // 2
    side = pid // tiles
    tile = pid % tiles
    row, column = tile_of(tile, blocks)
    i = row * BLOCK + tl.arange(0, BLOCK)
    k = column * BLOCK + tl.arange(0, BLOCK)
    if side == 0:
        half = _half_squares(s, s_shape, i, k, count, BLOCK, S_DEPTH)
    else:
        half = _half_squares(t, t_shape, i, k, count, BLOCK, T_DEPTH)
    half = tl.where((i < count)[:, None] & (k < count)[None, :], half, 0.0)
    length = tl.sqrt(2 * half)
    # a length that is no normal number of float32 has no inverse there
    tiny = length < 2.0**-126
    inverse = tl.where(tiny, 0.0, 1 / tl.where(tiny, 1.0, length)).to(tl.float32)

    pitch = tl.cast(blocks * BLOCK, tl.int64)
    place = i[:, None] * pitch + k[None, :]
    mirrored = k[None, :] * pitch + i[:, None]
    halves = scratch + halves_at + side * pitch * pitch
    put(halves, place, mirrored, half)
    put(inverses + side * pitch * pitch, place, mirrored, inverse)
    times = tl.where(row == column, 1.0, 2.0).to(tl.float64)
    positive = tl.where(half == 0, 0.0, 1.0)  # a NaN is
    tl.store(scratch + side * tiles + tile, tl.sum(tl.sum(length, 1), 0) * times)
    tl.store(scratch + (2 + side) * tiles + tile, tl.sum(tl.sum(positive, 1), 0).to(tl.float64) * times)
