"""What the kernels over attention maps have in common. Functions of Triton; `common/launch.py` explains
views, folds and grids.

Sums over channels run in float32 within a program: each lane adds at most 64 rows one after the other, up to
4096 channels, and the lanes are added as a tree. The programs' sums are added in float64, so that rounding
errors do not grow with their number. Sums over positions run in float64, as on a CPU: a map whose squares
leave float32's range still has its norm. Every order is fixed, whatever program is the last to finish a
sample.

CONFIG[ITEM] is what of a tensor is constant in a kernel, `launch.config`. It is handed down whole and its
numbers get names before they are used as shapes: Triton 3.6 takes numbers out of a constant tuple of tuples,
and neither goes deeper nor passes a part of one on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.common.fields import (
    HALF,
    HEIGHT,
    IS_FLAT,
    IS_SIGNED,
    LENGTH,
    LINE_STRIDE,
    PARITY,
    PLANE_STRIDE,
    POSITION_STRIDE,
    POWER,
    ROW_STRIDE,
    ROWS,
    ROWS_INNER,
    SAMPLE_STRIDE,
    TILE_LENGTH,
    TILE_ROWS,
    UNIT,
    WHOLE,
    WIDTH,
)


@triton.jit
def raised(x, WHOLE: tl.constexpr, HALF: tl.constexpr):
    """x^(WHOLE + HALF / 2), WHOLE at least 1, by multiplications, as near as pow's rounding."""
    y = x
    for _ in tl.static_range(WHOLE - 1):
        y *= x
    if HALF:
        y *= tl.sqrt_rn(x)
    return y


@triton.jit
def real_power(x, P: tl.constexpr, PARITY: tl.constexpr, SIGNED: tl.constexpr):
    """|x|^P, or x^P if SIGNED; by way of float64, whose logarithm costs no accuracy."""
    y = tl.exp2(tl.log2(tl.abs(x).to(tl.float64)) * P).to(tl.float32)
    if SIGNED:
        if PARITY == 1:
            y = tl.where(x < 0, -y, y)
        elif PARITY == 0:
            y = tl.where(x < 0, float("nan"), y)
    return y


@triton.jit
def channel_power(x, CONFIG: tl.constexpr, ITEM: tl.constexpr):
    """|x|^p, x^p if signed."""
    if CONFIG[ITEM][WHOLE] == 0:
        return real_power(x, CONFIG[ITEM][POWER], CONFIG[ITEM][PARITY], CONFIG[ITEM][IS_SIGNED])
    elif CONFIG[ITEM][IS_SIGNED] or (CONFIG[ITEM][WHOLE] == 2 and not CONFIG[ITEM][HALF]):
        return raised(x, CONFIG[ITEM][WHOLE], CONFIG[ITEM][HALF])
    else:
        return raised(tl.abs(x), CONFIG[ITEM][WHOLE], CONFIG[ITEM][HALF])


@triton.jit
def slope(x, CONFIG: tl.constexpr, ITEM: tl.constexpr):
    """sign(x) |x|^(p-1), x^(p-1) if signed; at p = 1 that of 0 and of NaN is 0, as in PyTorch."""
    if CONFIG[ITEM][WHOLE] == 0:
        if CONFIG[ITEM][IS_SIGNED]:
            # one less turns odd (1) into even (2) and back
            return real_power(
                x, CONFIG[ITEM][POWER] - 1, (3 - CONFIG[ITEM][PARITY]) if CONFIG[ITEM][PARITY] else 0, True
            )
        else:
            y = real_power(x, CONFIG[ITEM][POWER] - 1, 0, False)
            return tl.where(x < 0, -y, y)
    elif CONFIG[ITEM][WHOLE] == 1:
        if CONFIG[ITEM][HALF]:
            y = tl.sqrt_rn(tl.abs(x))
            return tl.where(x < 0, -y, y)
        elif CONFIG[ITEM][IS_SIGNED]:
            return tl.full(x.shape, 1.0, tl.float32)
        else:
            return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
    elif CONFIG[ITEM][IS_SIGNED]:
        return raised(x, CONFIG[ITEM][WHOLE] - 1, CONFIG[ITEM][HALF])
    elif CONFIG[ITEM][WHOLE] == 2 and not CONFIG[ITEM][HALF]:
        return x
    else:
        y = raised(tl.abs(x), CONFIG[ITEM][WHOLE] - 1, CONFIG[ITEM][HALF])
        return tl.where(x < 0, -y, y)


@triton.jit
def rows_of(view, CONFIG: tl.constexpr, ITEM: tl.constexpr):
    """The number of rows, and the length of one. ``view``: MatrixView.numbers."""
    if CONFIG[ITEM][ROWS_INNER]:
        return view[ROWS] * CONFIG[ITEM][UNIT], view[LENGTH]
    else:
        return view[ROWS], view[LENGTH] * CONFIG[ITEM][UNIT]


@triton.jit
def places(view, CONFIG: tl.constexpr, ITEM: tl.constexpr, n, row, rows, position):
    """Offsets of a tile: sample n, rows ``row + rows``, positions ``position``. In int64: strides may be as
    large as the tensor.
    """
    if CONFIG[ITEM][IS_FLAT]:
        if CONFIG[ITEM][ROWS_INNER]:
            sample = n.to(tl.int64) * view[SAMPLE_STRIDE] * CONFIG[ITEM][UNIT]
            across = (row + rows).to(tl.int64)
            along = position.to(tl.int64) * view[POSITION_STRIDE] * CONFIG[ITEM][UNIT]
        else:
            sample = n.to(tl.int64) * view[SAMPLE_STRIDE] * CONFIG[ITEM][UNIT]
            across = (row + rows).to(tl.int64) * view[ROW_STRIDE] * CONFIG[ITEM][UNIT]
            along = position.to(tl.int64) * view[POSITION_STRIDE]
    else:
        sample = n.to(tl.int64) * view[SAMPLE_STRIDE]
        across = (row + rows).to(tl.int64) * view[ROW_STRIDE]
        line = position // view[WIDTH]
        plane = line // view[HEIGHT]
        along = (
            plane.to(tl.int64) * view[PLANE_STRIDE]
            + (line % view[HEIGHT]).to(tl.int64) * view[LINE_STRIDE]
            + (position % view[WIDTH]).to(tl.int64) * view[POSITION_STRIDE]
        )
    return sample + across[:, None] + along[None, :]


@triton.jit
def row_step(view, CONFIG: tl.constexpr, ITEM: tl.constexpr):
    """How far the next tile of rows is. A tensor always: Triton 3.7 does not compile a returned constant."""
    if CONFIG[ITEM][ROWS_INNER]:
        return tl.cast(CONFIG[ITEM][TILE_ROWS], tl.int64)
    elif CONFIG[ITEM][IS_FLAT]:
        return tl.cast(view[ROW_STRIDE], tl.int64) * (CONFIG[ITEM][UNIT] * CONFIG[ITEM][TILE_ROWS])
    else:
        return tl.cast(view[ROW_STRIDE], tl.int64) * CONFIG[ITEM][TILE_ROWS]


@triton.jit
def sum_powers(
    x,
    view,
    n,
    block,
    chunk,
    steps,
    out,
    CONFIG: tl.constexpr,
    ITEM: tl.constexpr,
    y=None,
    y_view=None,
    residual=None,
    residual_view=None,
    ONCE: tl.constexpr = False,
):
    """Writes a program's sums of powers, a number for each position of its block.

    ONCE: the second-level cache need not keep what is read.

    ``out`` holds, for each chunk, a row of sums; a folded row is as many rows of positions as channels were
    folded into one. With y, the powers are those of y = relu(x + residual), written on the way and rounded
    to its dtype.
    """
    ROW_BLOCK: tl.constexpr = CONFIG[ITEM][TILE_ROWS]
    BLOCK: tl.constexpr = CONFIG[ITEM][TILE_LENGTH]
    rows_count, length = rows_of(view, CONFIG, ITEM)
    rows = tl.arange(0, ROW_BLOCK)
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    first = chunk * steps * ROW_BLOCK
    at = x + places(view, CONFIG, ITEM, n, first, rows, position)
    if y is not None:
        y_at = y + places(y_view, CONFIG, ITEM, n, first, rows, position)
    if residual is not None:
        residual_at = residual + places(residual_view, CONFIG, ITEM, n, first, rows, position)
    total = tl.zeros((ROW_BLOCK, BLOCK), tl.float32)
    for row in range(first, tl.minimum(first + steps * ROW_BLOCK, rows_count), ROW_BLOCK):
        mask = (row + rows < rows_count)[:, None] & inside[None, :]
        v = tl.load(at, mask=mask, other=0, eviction_policy="evict_first" if ONCE else "").to(tl.float32)
        at += row_step(view, CONFIG, ITEM)
        if y is not None:
            if residual is not None:
                v += tl.load(residual_at, mask=mask, other=0).to(tl.float32)
                residual_at += row_step(residual_view, CONFIG, ITEM)
            # a NaN stays
            rounded = tl.where(v < 0, 0.0, v).to(y.dtype.element_ty)
            tl.store(y_at, rounded, mask=mask)
            y_at += row_step(y_view, CONFIG, ITEM)
            v = rounded.to(tl.float32)
        total += channel_power(v, CONFIG, ITEM)
    tl.store(out + chunk * length + position, tl.sum(total, 0), mask=inside)


@triton.jit
def last_of(ticket, count):
    """Whether this program is the last of ``count`` to come here; it then sees what all of them have written.

    The barrier orders the other threads' writes before the ticket (Triton 3.9 puts one there by itself), the
    ticket's release and acquire order the programs.
    """
    tl.debug_barrier()
    return tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1


@triton.jit
def collapse(partial, parts, positions, BLOCK: tl.constexpr):
    """Adds ``parts`` rows of partial sums into the first, in order; returns the totals' sum of squares.

    They are added in float64: a folded feature of many channels has hundreds.
    """
    squares = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, positions, BLOCK):
        s = first + tl.arange(0, BLOCK)
        mask = s < positions
        # .cg: other multiprocessors wrote them
        total = tl.zeros((BLOCK,), tl.float64)
        for part in range(0, parts):
            total += tl.load(partial + part * positions + s, mask=mask, other=0, cache_modifier=".cg").to(
                tl.float64
            )
        q = total.to(tl.float32)
        # a block of fewer positions than threads is held several times over: none may read what another has
        # written already
        tl.debug_barrier()
        tl.store(partial + s, q, mask=mask)
        wide = q.to(tl.float64)
        squares += wide * wide
    tl.debug_barrier()
    return tl.sum(squares, 0)


@triton.jit
def added_up(at, count, BLOCK: tl.constexpr):
    """The sum of ``count`` numbers that other programs wrote, in float64 and in a fixed order."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        # .cg: other multiprocessors wrote them
        sums += tl.load(at + i, mask=i < count, other=0, cache_modifier=".cg").to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def normalization(norm, EPS: tl.constexpr, ADD_EPS: tl.constexpr):
    """Of a map of that norm: the divisor, and what dq = (g - y <g, y> along) scale takes, without the second
    term unless has_along.
    """
    if ADD_EPS:
        divisor = norm + EPS
        # times a NaN it is NaN, as in PyTorch
        along = tl.where(norm == 0, 0.0, 1 + EPS / norm)
        has_along = norm == norm
        # 0 / 0 reaches the gradient, as in PyTorch
        scale = tl.where(divisor == 0, float("nan"), 1 / divisor)
    else:
        # a NaN stays
        divisor = tl.where(norm < EPS, EPS, norm)
        has_along = norm > EPS
        along = tl.full((), 1.0, tl.float64)
        scale = 1 / divisor
    return divisor, has_along, along, scale


@triton.jit
def along_gradient(g, y, dot, has_along, along, scale):
    """dq, in float64, of the normalized map y with the gradient g and dot = <g, y>."""
    wide = g.to(tl.float64)
    return tl.where(has_along, wide - y.to(tl.float64) * (along * dot), wide) * scale


@triton.jit
def normalized(q, reciprocal):
    """y, rounded to float32: equal maps then have no distance, however what follows is contracted."""
    return (q.to(tl.float64) * reciprocal).to(tl.float32)
