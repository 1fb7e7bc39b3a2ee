"""RKD's kernel of triples; `rkd/loss.py` says how it works.

Products and sums are not contracted here: it is compiled so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.rkd.pair_kernels import put, tile_of


@triton.jit
def _clamped(x):
    """Between -1 and 1; a NaN stays."""
    return tl.where(x > 1, 1.0, tl.where(x < -1, -1.0, x))


@triton.jit
def _means(sums, tiles, BLOCK: tl.constexpr):
    """Of each side the mean of the positive lengths, 1 if there is none, and their number."""
    lengths_s = tl.zeros((BLOCK,), tl.float64)
    lengths_t = tl.zeros((BLOCK,), tl.float64)
    count_s = tl.zeros((BLOCK,), tl.float64)
    count_t = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, tiles, BLOCK):
        at = first + tl.arange(0, BLOCK)
        lengths_s += tl.load(sums + at, mask=at < tiles, other=0)
        lengths_t += tl.load(sums + tiles + at, mask=at < tiles, other=0)
        count_s += tl.load(sums + 2 * tiles + at, mask=at < tiles, other=0)
        count_t += tl.load(sums + 3 * tiles + at, mask=at < tiles, other=0)
    n_s = tl.maximum(tl.sum(count_s, 0), 1.0)
    n_t = tl.maximum(tl.sum(count_t, 0), 1.0)
    mean_s = tl.sum(lengths_s, 0) / n_s
    mean_t = tl.sum(lengths_t, 0) / n_t
    return tl.where(mean_s > 0, mean_s, 1.0), n_s, tl.where(mean_t > 0, mean_t, 1.0), n_t


@triton.jit
def _unit_of(mean):
    """The power of two below a mean length, by its exponent: products with it are exact."""
    power = (mean.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    return tl.where((mean > 2.0**-500) & (mean < 2.0**500), power, 1.0)


@triton.jit
def _halves(at, scale):
    """Halved squares of lengths in the unit whose inverse square is ``scale``."""
    return tl.load(at) * scale


@triton.jit
def _inverses(at, unit):
    """Inverses of lengths in that unit. Lengths below 2^-40 count as 0: of their angles the law of cosines
    would leave few digits.
    """
    inverse = tl.load(at) * unit.to(tl.float32)
    return tl.where(inverse > 2.0**40, 0.0, inverse)


@triton.jit
def _cosine(leg, other, opposite, inverse, other_inverse):
    """The law of cosines. In float64 until the numbers that cancel are subtracted; legs may be exchanged,
    with the same bits.
    """
    return ((leg + other) - opposite).to(tl.float32) * (inverse * other_inverse)


@triton.jit
def _pull(slope_l, slope_k, slope_i, to_i, to_k, between):
    """What the three angles of a triangle (i, k, l) add to the factor of x_i - x_k; ``to_i``: 1 / |x_l - x_i|
    and so on. Each product is rounded alike wherever it occurs, and cancels there.
    """
    at_ends = (slope_k * (to_k * between)).to(tl.float64) + (slope_i * (to_i * between)).to(tl.float64)
    return at_ends - (slope_l * (to_i * to_k)).to(tl.float64)


@triton.jit
def _joined(pulls, turns, inverse):
    """The sums of a side over l; what only turns the side between i and k leaves its length."""
    wide = inverse.to(tl.float64)
    return tl.sum(pulls, 2) - tl.sum(turns.to(tl.float64), 2) * wide * wide


@triton.jit(do_not_specialize=["blocks", "pair_tiles"])
def rkd_triples_kernel(
    scratch,
    inverses,
    s_matrix,
    t_matrix,
    angle_factor,
    distance_factor,
    halves_at,
    blocks,
    pair_tiles,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ADDED: tl.constexpr,
    ANGLE: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """``pair_tiles``: how many numbers each sum of the lengths is in, 1 where they have been added up."""
    pid = tl.program_id(0)
    tiles = blocks * (blocks + 1) // 2
    row, column = tile_of(pid, blocks)
    i = row * BLOCK + tl.arange(0, BLOCK)
    k = column * BLOCK + tl.arange(0, BLOCK)
    times = tl.where(row == column, 1.0, 2.0).to(tl.float64)
    pitch = blocks * BLOCK
    square = tl.cast(pitch, tl.int64) * pitch
    place = i[:, None] * pitch + k[None, :]
    mirrored = k[None, :] * pitch + i[:, None]
    parts = scratch + 4 * pair_tiles
    s_halves = scratch + halves_at
    t_halves = s_halves + square
    s_inverses = inverses
    t_inverses = inverses + square
    s_mean, s_count, t_mean, t_count = _means(scratch, pair_tiles, ADDED)
    value = tl.zeros((BLOCK, BLOCK), tl.float64)
    s_pull = tl.zeros((BLOCK, BLOCK), tl.float64)
    t_pull = tl.zeros((BLOCK, BLOCK), tl.float64)

    if ANGLE:
        s_unit = _unit_of(s_mean)
        s_scale = 1 / (s_unit * s_unit)
        t_unit = _unit_of(t_mean)
        t_scale = 1 / (t_unit * t_unit)
        s_c = _halves(s_halves + place[:, :, None], s_scale)
        t_c = _halves(t_halves + place[:, :, None], t_scale)
        s_rc = _inverses(s_inverses + place[:, :, None], s_unit)
        t_rc = _inverses(t_inverses + place[:, :, None], t_unit)
        to_i = i[:, None, None] * pitch
        to_k = k[None, :, None] * pitch
        loss = tl.zeros((BLOCK, BLOCK, LANES), tl.float32)
        s_sum = tl.zeros((BLOCK, BLOCK, LANES), tl.float64)
        t_sum = tl.zeros((BLOCK, BLOCK, LANES), tl.float64)
        s_turn = tl.zeros((BLOCK, BLOCK, LANES), tl.float32)
        t_turn = tl.zeros((BLOCK, BLOCK, LANES), tl.float32)
        for first in range(0, pitch, LANES):
            to_l = (first + tl.arange(0, LANES))[None, None, :]
            s_a = _halves(s_halves + to_i + to_l, s_scale)
            s_b = _halves(s_halves + to_k + to_l, s_scale)
            t_a = _halves(t_halves + to_i + to_l, t_scale)
            t_b = _halves(t_halves + to_k + to_l, t_scale)
            s_ra = _inverses(s_inverses + to_i + to_l, s_unit)
            s_rb = _inverses(s_inverses + to_k + to_l, s_unit)
            t_ra = _inverses(t_inverses + to_i + to_l, t_unit)
            t_rb = _inverses(t_inverses + to_k + to_l, t_unit)
            apart = _cosine(s_a, s_b, s_c, s_ra, s_rb) - _cosine(t_a, t_b, t_c, t_ra, t_rb)
            slope_l = _clamped(apart)
            loss += slope_l * (apart - 0.5 * slope_l)
            if s_matrix is not None or t_matrix is not None:
                s_k = _cosine(s_b, s_c, s_a, s_rb, s_rc)
                t_k = _cosine(t_b, t_c, t_a, t_rb, t_rc)
                s_i = _cosine(s_a, s_c, s_b, s_ra, s_rc)
                t_i = _cosine(t_a, t_c, t_b, t_ra, t_rc)
                slope_k = _clamped(s_k - t_k)
                slope_i = _clamped(s_i - t_i)
                if s_matrix is not None:
                    s_sum += _pull(slope_l, slope_k, slope_i, s_ra, s_rb, s_rc)
                    s_turn += slope_k * s_k + slope_i * s_i
                if t_matrix is not None:
                    t_sum += _pull(slope_l, slope_k, slope_i, t_ra, t_rb, t_rc)
                    t_turn += slope_k * t_k + slope_i * t_i
        factor = tl.cast(angle_factor, tl.float64)
        value += factor * tl.sum(loss.to(tl.float64), 2)
        if s_matrix is not None:
            found = _joined(s_sum, s_turn, _inverses(s_inverses + place, s_unit))
            s_pull += 2 * factor * s_scale * found
        if t_matrix is not None:
            found = _joined(t_sum, t_turn, _inverses(t_inverses + place, t_unit))
            t_pull -= 2 * factor * t_scale * found

    if DISTANCE:
        factor = tl.cast(distance_factor, tl.float64)
        s_length = tl.sqrt(2 * tl.load(s_halves + place))
        t_length = tl.sqrt(2 * tl.load(t_halves + place))
        apart = s_length / s_mean - t_length / t_mean
        slope = _clamped(apart)
        value += factor * slope * (apart - 0.5 * slope)
        # a length changes its side's mean too: the gradient takes that from the sums
        if s_matrix is not None:
            s_pull += 2 * factor / s_mean * slope * tl.load(s_inverses + place).to(tl.float64)
            through = tl.sum(tl.sum(slope * s_length, 1), 0) / (s_mean * s_mean * s_count)
            tl.store(parts + tiles + pid, through * times)
        if t_matrix is not None:
            t_pull -= 2 * factor / t_mean * slope * tl.load(t_inverses + place).to(tl.float64)
            through = tl.sum(tl.sum(slope * t_length, 1), 0) / (t_mean * t_mean * t_count)
            tl.store(parts + 2 * tiles + pid, through * times)

    tl.store(parts + pid, tl.sum(tl.sum(value, 1), 0) * times)
    if s_matrix is not None:
        put(s_matrix, place, mirrored, s_pull)
    if t_matrix is not None:
        put(t_matrix, place, mirrored, t_pull)
