"""How the FSP kernels see a feature: pooled, part by part, in one of the precisions; and what their tiles
are.

Common pooling windows are read where the feature is: averages over windows that do not overlap, of at most
four numbers. Anything else (maxima, other windows) is pooled by a launch of its own before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastkd.kernels import interpreting, own_precision
from fastkd.kernels.common.launch import fits, matrix_view, power_of_two, served
from fastkd.kernels.common.pool import pool
from fastkd.kernels.common.windows import pooled_strides
from fastkd.kernels.fsp.fields import COARSE_TERMS, FINE_TERMS, STRIDE_C, UNIT

ONES = (1, 1, 1)
LARGEST_WINDOW = 4
FAR = 2**31  # offsets within a sample from which on they are int64: masked lanes may lie beyond the last
Size = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What a kernel gets of a feature: ``numbers``, and constants (``config``, flat: see common/tile.py)."""

    numbers: Size
    config: tuple[bool | int, ...]

    @property
    def register_heavy(self) -> bool:
        """Whether its addresses take many registers: windows, or rows that are no multiples of a vector."""
        return self.config[UNIT.value] == 1

    @property
    def scalar(self) -> bool:
        """Whether it is even read number by number."""
        return self.register_heavy and self.numbers[STRIDE_C.value] != 1


def three(size: Sequence[int]) -> Size:
    """(D, H, W)."""
    return (*(1,) * (3 - len(size)), *size)


def window(own: Sequence[int], common: Sequence[int], *, max_pool: bool) -> Size | None:
    """(d, h, w) over which a feature of size ``own`` is averaged where it is read; None: pooled before."""
    if tuple(own) == tuple(common):
        return ONES
    found = tuple(a // b for a, b in zip(three(own), three(common)))
    fits = all(a % b == 0 for a, b in zip(own, common)) and math.prod(found) <= LARGEST_WINDOW
    return found if fits and not max_pool else None


def view(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, of: Size = ONES, parts: Size = ONES
) -> View:
    """Of a feature pooled over windows ``of``, on a grid with ``parts`` pooled numbers at each position."""
    fits(shape[1], math.prod(shape[2:]))
    exact = dtype == torch.bfloat16 and of == ONES
    far = sum((size + 128) * stride for size, stride in zip(shape[1:], strides[1:])) >= FAR
    if of == parts == ONES:
        w = matrix_view(shape, [strides], dtype.itemsize, folded=False)
        return View((*w.numbers(), *(0,) * 6), (w.flat, w.rows_inner, w.unit, *ONES, *ONES, exact, far))
    missing = 5 - len(shape)
    along = (*(0,) * missing, *strides[2:])
    grid = tuple(size // a // b for size, a, b in zip(three(shape[2:]), of, parts))
    steps = [s * a for s, a in zip(along, of)]
    numbers = (
        shape[1],
        math.prod(grid),
        *grid[1:],
        *strides[:2],
        *(s * b for s, b in zip(steps, parts)),
        *along,
        *steps,
    )
    return View(numbers, (False, False, 1, *of, *parts, exact, far))


def mode(tensors: Sequence[Tensor], precision: str | None) -> str:
    """How products are made; `fsp/forward.py` says how near that is."""
    if all(x.dtype == torch.bfloat16 for x in tensors):
        return "bf16"
    precision = precision or own_precision()
    if precision == "ieee" and all(x.dtype != torch.float32 for x in tensors):
        return "tf32x3"
    return precision


class Tiles(NamedTuple):
    """The largest tile of a program, and how its loads are pipelined."""

    block: int  # rows, and columns
    depth: int  # of what is multiplied at a time
    stages: int  # blocks of depth that are in shared memory or on the way to it
    gradient_depth: int = 0  # of gradients, where these are others
    gradient_stages: int = 0


SHALLOW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)  # before: no blocks of depth 8
TILES = {
    "ieee": Tiles(64, 8, 2, gradient_depth=16) if SHALLOW else Tiles(64, 16, 1, gradient_stages=2),
    "tf32": Tiles(128, 32, 2),
    "tf32x3": Tiles(64, 16, 2),
    "bf16": Tiles(128, 32, 2),
}
"""By mode; `python -m speed.gpu_parts tiles` in benchmarks/ tries others on a GPU and prints the lines to put
here.
"""


def tile(
    rows: int,
    columns: int,
    depth: int,
    how: str,
    *,
    register_heavy: bool = False,
    widest: int = 128,
    costly_rows: bool = False,
    gradient: bool = False,
) -> Size:
    """(row block, column block, depth) of a program's tile of the product of (rows, depth) and (depth,
    columns).

    register_heavy: addresses of what is multiplied take many registers; widest: of the column block, where
    there are more of those, or two sums at a time. costly_rows: those of the first factor alone, and it takes
    several loads a number. The bounds below are where ptxas no longer spills.
    """
    most, deepest = TILES[how].block, TILES[how].depth
    if gradient:
        deepest = TILES[how].gradient_depth or deepest
    if how == "ieee":  # without tensor cores a thread holds its rows and columns of both blocks
        high, wide = (most // 2, 2 * most) if costly_rows else (most, min(most, widest))
        return min(max(power_of_two(rows), 16), high), min(max(power_of_two(columns), 16), wide), deepest
    if min(rows, columns) < 128:
        most = min(most, 64)
    block, other = (min(max(power_of_two(n), 16), most) for n in (rows, columns))
    if register_heavy and max(block, other) >= 64:
        deepest = 16
    return block, min(other, widest), min(max(power_of_two(depth), 16), deepest)


def low_rank_tile(positions: int, how: str, *, register_heavy: bool = False) -> Size:
    """The same of the products over channels, three at a time (`fsp/low_rank.py`)."""
    if how == "ieee":
        block = min(max(power_of_two(positions), 16), 32)
        return block, block, 16
    depth = 16 if how == "tf32x3" or register_heavy else 32
    if how == "tf32x3" and SHALLOW and not spills(how):
        depth = 8
    if how != "tf32x3" and positions > 32 and _joins_warps():
        return 64, 64, depth
    # so that four warps, or eight of the larger, divide its columns: see `owned`
    columns = min(max(power_of_two(positions), 32), 64)
    return columns // 2, columns, depth


@functools.cache
def _capability() -> int:
    """The device's, as 10 times its major number and its minor one; 0 where kernels are interpreted."""
    arch = 0 if interpreting() else triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 0


def _joins_warps() -> bool:
    """Whether the device multiplies tiles of 64 rows by groups of four warps (sm_90) or by none at all
    (sm_100), rather than by single ones.
    """
    return 90 <= _capability() < 120


def most_warps(t: Size) -> int:
    """How many warps can have a part of tile t of their own, where several products are added to it.

    Triton divides such a tile along its longer side alone; along its rows, where warps multiply in groups. A
    warp's part is 16 rows or 8 columns at least. More warps compute the same numbers again.
    """
    rows, columns = t[:2]
    by_rows = rows >= columns or (rows >= 64 and _joins_warps())
    return rows // 16 if by_rows else columns // 8


def warps(tiles: Sequence[Size], how: str, low_rank: Sequence[Size] = ()) -> int:
    if any(math.prod(t[:2]) > 64 * 64 for t in tiles) or any(t[0] == 64 for t in low_rank):
        return 8  # fewer would not have the registers
    return 4 if how == "ieee" else min(4, max(most_warps(t) for t in tiles))


def options(how: str, count: int, *, gradient: bool = False, tight: bool = False) -> dict[str, int]:
    """Of a launch of ``count`` warps a program; tight: two stages of its loads leave too few registers."""
    tiles = TILES[how]
    stages = (tiles.gradient_stages if gradient else 0) or tiles.stages
    return {"num_warps": count, "num_stages": 1 if tight else stages}


def spills(how: str) -> bool:
    """Of losses: where ptxas spilled with two stages. Warps by themselves hold more of three products."""
    return how == "tf32x3" and not _joins_warps()


def tight(how: str, count: int, *, through: bool = False) -> bool:
    """Of gradients: where ptxas spilled with two stages. through: see `owned`.

    Eight warps do not hold a matrix that is made on the way. On sm_100 eight have half of the registers.
    """
    return count > 4 and (through or (how == "bf16" and 100 <= _capability() < 120))


def narrowed(cut: Size, count: int) -> Size:
    """A cut of _Gradients of half as many columns, where four warps have no registers for two sums of 64 x 64
    and for two stages of loads.
    """
    rows, columns, *rest = cut
    two_sums = cut[COARSE_TERMS.value] and cut[FINE_TERMS.value]
    return (rows, columns // 2, *rest) if count <= 4 and two_sums and rows * columns >= 64 * 64 else cut


def added_up(how: str, several: bool) -> bool:
    """Whether a step adds several products to a tile: of a number's parts, or of ``several`` factors."""
    return how in ("bf16", "tf32x3") or (how == "tf32" and several)


def owned(t: Size, count: int, rows: int, columns: int, *, through: bool = False) -> Size:
    """Tile t, or one near it of which each of ``count`` warps can have a part of its own.

    rows, columns: of the whole. through: a tile of as many rows, and of t's depth as columns, is made on the
    way and multiplied.
    """
    high, wide, deep = t[:3]
    joins = high >= 64 and _joins_warps()
    if joins and _capability() >= 100:  # a single thread starts all its products
        return t
    shapes = [(high, wide), (high, 2 * wide), (high // 2, wide), (high // 2, 2 * wide)]
    if joins:  # tiles of fewer than 64 rows are multiplied by single warps
        taller = [(2 * high, wide)] if through and rows >= 2 * high else []
        shapes = [(high, wide), *taller, (high // 2, 2 * wide), (high // 2, wide)]
    widest = max(power_of_two(columns), wide)
    for depth in (deep, 32, 64) if through else (deep,):
        for one, other in shapes:
            tiles = [(one, other), *([(one, depth)] if through else [])]
            if one >= 16 and other <= widest and min(map(most_warps, tiles)) >= count:
                return one, other, depth, *t[3:]
    return t


def checked(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    first = tensors[0]
    for x, name in zip(tensors, names, strict=True):
        served(x, name, first.device)
        if not 3 <= x.dim() <= 5 or x.dim() != first.dim() or x.shape[0] != first.shape[0]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: wrong in rank or batch size")


class Sources:
    """Which tensors a kernel reads: those of the call, and those pooled before, each once."""

    def __init__(self, tensors: Sequence[Tensor], *, max_pool: bool) -> None:
        self.tensors, self.max_pool = tensors, max_pool
        self.pools: list[tuple[int, tuple[int, ...]]] = []

    def add(self, i: int, common: Sequence[int], parts: tuple[int, ...] = ONES) -> tuple[int, View]:
        """Tensor i, pooled to ``common``: its place among the sources, and how it is seen."""
        x = self.tensors[i]
        of = window(x.shape[2:], common, max_pool=self.max_pool)
        if of is not None:
            return i, view(x.shape, x.stride(), x.dtype, of, parts)
        target = (*x.shape[:2], *common)
        if (i, target) not in self.pools:
            self.pools.append((i, target))
        place = len(self.tensors) + self.pools.index((i, target))
        return place, view(target, pooled_strides(x, target), torch.float32, ONES, parts)

    def made(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """All sources, and of those pooled by maxima where these lie."""
        return [
            *((x, None) for x in tensors),
            *(pool(tensors[i], target, max_pool=self.max_pool) for i, target in self.pools),
        ]
