"""The kernels of the CRD loss; `crd/loss.py` says how they work, and launches them.

A program's number says the side, 0 for the student's embeddings against the teacher's bank, the image, and
the part of its rows. Scores are inner products divided by the temperature, in units of log(2). Sums run in
float32 within a program and in float64 over programs, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.tile import added_up

LN2 = tl.constexpr(0.6931471805599453)
# not specialized: a new batch size need not be a new kernel
_COUNTS = ["count", "drawn", "size", "parts", "steps"]


@triton.jit
def log1p(v):
    """log(1 + v) of v from 0 on, within two roundings of float32, whatever v is.

    1 + v = 2^e (1 + f) with f from -1/4 to 1/2, found without rounding 1 + v where v is small; log(1 + f) is
    f + f^2 p(f). The polynomial p is fitted for the least relative error of that, 8e-9. No division and no
    branch: each lane of a warp has this for all rows of the warp.
    """
    e = ((1 + v).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000  # e 2^23, from the bits of 3/4
    f = (v.to(tl.int32, bitcast=True) - e).to(tl.float32, bitcast=True)  # v / 2^e
    f += 0.25 * (0x40800000 - e).to(tl.float32, bitcast=True) - 1  # 4 / 2^e
    p = f * -0.04492789 + 0.10449991
    p = p * f - 0.1316224
    p = p * f + 0.14481753
    p = p * f - 0.1664773
    p = p * f + 0.19990626
    p = p * f - 0.25000057
    p = p * f + 0.33333454
    p = p * f - 0.5
    found = e.to(tl.float32) * (0.6931471805599453 / 8388608) + (f + f * (f * p))
    return tl.where(v < float("inf"), found, v)


@triton.jit
def normalizer_of(given, odds, side, programs, scale, BLOCK: tl.constexpr):
    """That of a side: the one given, or where that is not above 0 ``scale`` times the sum of exponentials."""
    z = tl.load(given + side)
    if (z > 0) == 0:
        z = (added_up(odds + side * programs, programs, BLOCK) * scale).to(tl.float32)
    return z


@triton.jit
def drawn_rows(bank, index, inside, size, columns, WIDTH: tl.constexpr):
    """Which of ``index`` are rows of the bank, and those rows; zeros where ``inside`` is False."""
    known = (index >= 0) & (index < size)
    mask = (inside & known)[:, None] & (columns < WIDTH)[None, :]
    places = index[:, None] * WIDTH + columns[None, :]
    return known, tl.load(bank + places, mask=mask, other=0).to(tl.float32)


@triton.jit
def scores_of(x, tile, known):
    """NaN of what is no row of the bank."""
    return tl.where(known, tl.sum(tile * x[None, :], 1), float("nan"))


@triton.jit(do_not_specialize=_COUNTS)
def crd_odds_kernel(
    s,
    t,
    s_bank,
    t_bank,
    rows,
    given,
    odds,
    sharpness,
    count,
    drawn,
    size,
    parts,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums of exponentials for a side whose normalizer is not known."""
    pid = tl.program_id(0)
    side = pid // (count * parts)
    if (tl.load(given + side) > 0) == 0:
        local = pid % (count * parts)
        n = (local // parts).to(tl.int64)
        begin = (local % parts) * steps * ROWS
        end = tl.minimum(begin + steps * ROWS, drawn + 1)
        columns = tl.arange(0, COLUMNS)
        embeddings = tl.where(side == 0, s, t)
        bank = tl.where(side == 0, t_bank, s_bank)
        x = tl.load(embeddings + n * WIDTH + columns, mask=columns < WIDTH, other=0) * sharpness
        at = rows + n * (drawn + 1)
        k = begin + tl.arange(0, ROWS)
        sums = tl.zeros((ROWS,), tl.float32)
        for _ in range(begin, end, ROWS):
            inside = k < end
            known, tile = drawn_rows(
                bank, tl.load(at + k, mask=inside, other=0), inside, size, columns, WIDTH
            )
            sums += tl.where(inside, tl.exp2(scores_of(x, tile, known)), 0.0)
            k += ROWS
        tl.store(odds + pid, tl.sum(sums, 0))


@triton.jit(do_not_specialize=_COUNTS)
def crd_loss_kernel(
    s,
    t,
    s_bank,
    t_bank,
    rows,
    given,
    sums,
    partial,
    sharpness,
    scale,
    inverse_noise,
    shift,
    level,
    count,
    drawn,
    size,
    parts,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    NEED_S: tl.constexpr,
    NEED_T: tl.constexpr,
):
    """A part's terms of the loss, and of the gradient but for ``weight / count / temperature``."""
    pid = tl.program_id(0)
    programs = count * parts
    side = pid // programs
    local = pid % programs
    n = (local // parts).to(tl.int64)
    part = local % parts
    begin = part * steps * ROWS
    end = tl.minimum(begin + steps * ROWS, drawn + 1)
    columns = tl.arange(0, COLUMNS)
    embeddings = tl.where(side == 0, s, t)
    bank = tl.where(side == 0, t_bank, s_bank)
    x = tl.load(embeddings + n * WIDTH + columns, mask=columns < WIDTH, other=0) * sharpness
    z = normalizer_of(given, sums, side, programs, scale, BLOCK)
    inverse = inverse_noise / z
    at = rows + n * (drawn + 1)
    k = begin + tl.arange(0, ROWS)
    index = tl.load(at + k, mask=k < end, other=0)
    losses = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(begin, end, ROWS):
        inside = (k > 0) & (k < end)  # not the positive
        known, tile = drawn_rows(bank, index, inside, size, columns, WIDTH)
        k += ROWS
        index = tl.load(at + k, mask=k < end, other=0)  # of the next tile, while this one is under way
        odds = tl.exp2(scores_of(x, tile, known)) * inverse
        shifted = odds + shift
        losses += tl.where(inside, log1p(shifted), 0.0)
        if NEED_S or NEED_T:
            total += tl.where(inside, odds / (shifted + 1), 0.0)[:, None] * tile
    loss = tl.sum(losses, 0)
    pull = tl.sum(total, 0)
    if part == 0:
        # log((P + noise + eps) / P) by the logarithm of P
        place = tl.load(at)
        known = (place >= 0) & (place < size)
        row = tl.load(bank + place * WIDTH + columns, mask=known & (columns < WIDTH), other=0).to(tl.float32)
        score = tl.sum(x.to(tl.float64) * row.to(tl.float64), 0) * LN2
        against = tl.log(z.to(tl.float64)) + level - tl.where(known, score, float("nan"))
        loss += (tl.maximum(against, 0.0) + tl.log(1 + tl.exp(-tl.abs(against)))).to(tl.float32)
        pull -= (1 / (1 + tl.exp(-against))).to(tl.float32) * row
    tl.store(sums + 2 * programs + pid, loss)
    if NEED_S or NEED_T:
        wanted = (side == 0) & NEED_S | (side == 1) & NEED_T
        to = partial + ((side * parts + part).to(tl.int64) * count + n) * WIDTH + columns
        tl.store(to, pull, mask=wanted & (columns < WIDTH))


@triton.jit(do_not_specialize=["count", "parts", "numbers", "blocks"])
def crd_sum_kernel(
    given,
    sums,
    partial,
    loss,
    found,
    s_grad,
    t_grad,
    scale,
    factor,
    slope,
    count,
    parts,
    numbers,
    blocks,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss and the normalizers by the first program, numbers of the wanted gradients by the others."""
    pid = tl.program_id(0)
    programs = count * parts
    if pid == 0:
        total = added_up(sums + 2 * programs, 2 * programs, BLOCK)
        tl.store(loss, (total * factor).to(tl.float32))
        for side in tl.static_range(2):
            tl.store(found + side, normalizer_of(given, sums, side, programs, scale, BLOCK))
    elif partial is not None:
        local = pid - 1
        if s_grad is None:
            side = tl.full((), 1, tl.int64)
            to = t_grad
        elif t_grad is None:
            side = tl.full((), 0, tl.int64)
            to = s_grad
        else:
            side = (local // blocks).to(tl.int64)
            to = tl.where(side == 0, s_grad, t_grad)
        i = (local % blocks).to(tl.int64) * ADDED + tl.arange(0, ADDED)
        mask = i < numbers
        at = partial + side * parts * numbers + i
        added = tl.zeros((ADDED,), tl.float64)
        for _ in range(0, parts):
            added += tl.load(at, mask=mask, other=0).to(tl.float64)
            at += numbers
        tl.store(to + i, (added * slope).to(tl.float32), mask=mask)
