"""How a kernel sees a tensor, how its work is divided, and how it is launched with little host time.

**Viewing.** Every tensor is rows by positions, (N, C, S): `MatrixView` collapses its spatial dimensions to
one where its strides allow it, and to three else. A tile of a kernel is (row block, position block); which of
the two the threads run along follows from the strides (a stride of 1 is a constant to the compiler), so NCHW
and channels_last share their code. 16-byte accesses need lengths and strides that are known to be multiples
of a vector: sizes are passed divided by `unit`, a constant power of two, which the kernel multiplies back.

A contiguous map of few or odd positions is folded: (C, S) is read as (C / f, f S), where f S is a multiple of
a vector and fills a block better; each of the f parts is summed for itself, as a block of channels of its
own. 7x7 thus loads 16 bytes at a time in periods of 4 or 8 channels, and a lane keeps its position.

**Dividing.** `Grid` cuts a sample into position blocks and channel chunks. A program's tile has 4096 elements
for 128 threads: 32 numbers a thread, 8 loads of 16 bytes under way in float32 and 4 in half precision, hence
16 or 8 KiB a program. At 64 to 106 registers a thread 4 to 8 programs share a multiprocessor: some 64 KiB
under way, where bandwidth times latency (an H200's 4.8 TB/s, 0.8 us, 132 multiprocessors) asks for 29 KiB. A
chunk is as large as leaves four programs for each multiprocessor, between 32 and 512 KiB. These are
constants, not properties of the device: results are the same bits on each. This was reckoned, not measured.

**Launching.** What depends on shapes, strides and dtypes alone is made once and stored under that key
(`Plans`). The compiled kernel is stored with it, for each device and alignment of pointers, and launched
without going through Triton's binder again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import NegativeView
from fastkd.kernels.common.keys import settle
from fastkd.kernels.limits import LARGEST

THREADS = 128
TILE = 4096
LONGEST = 1024  # the largest position block
BLOCK = 256  # that of longer rows
PROGRAMS = 4 * 132
LEAST, MOST = 32 * 1024, 512 * 1024  # bytes of a program
CHUNKS = 16
SERVED = (torch.float16, torch.bfloat16, torch.float32)
MOST_PROGRAMS = 2**31 - 1  # of a launch, on any GPU
# fp_fusion: set, since its default is about to change; sums of products may be contracted
OPTIONS = {"num_warps": THREADS // 32, "num_stages": 1, "enable_fp_fusion": True}


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << (n - 1).bit_length()


def _unit(*numbers: int, most: int = 16) -> int:
    """The largest power of two, up to ``most``, that divides them all."""
    return math.gcd(most, *numbers)


@dataclass(frozen=True)
class MatrixView:
    """How kernels see tensors of one shape together: N samples of ``rows`` by ``length`` numbers each.

    strides: for each tensor (sample, row, plane, line, position); where ``flat`` the position's alone counts.
    """

    samples: int
    channels: int
    positions: int
    fold: int
    height: int
    width: int
    flat: bool
    rows_inner: bool
    unit: int
    itemsize: int
    strides: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return self.channels // self.fold

    @property
    def length(self) -> int:
        return self.positions * self.fold

    @property
    def bytes(self) -> int:
        return self.samples * self.channels * self.positions * self.itemsize

    def numbers(self, i: int = 0) -> tuple[int, ...]:
        """What the kernel gets of tensor i: sizes and strides, some of them divided by ``unit``."""
        n, r, d, h, w = self.strides[i]
        rows, length, unit = self.rows, self.length, self.unit
        if not self.flat:
            return rows, length, self.height, self.width, n, r, d, h, w
        if self.rows_inner:
            return rows // unit, length, 1, 1, n // unit, 1, 1, 1, w // unit
        return rows, length // unit, 1, 1, n // unit, r // unit, 1, 1, w


def _spatial(shape: Sequence[int], all_strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Spatial sizes and strides without dimensions of size 1, neighbours joined where all allow it."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in all_strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(found[-1] == given[d] * size for found, given in zip(strides, all_strides)):
            sizes[-1] *= size
            for found, given in zip(strides, all_strides):
                found[-1] = given[d]
            continue
        sizes.append(size)
        for found, given in zip(strides, all_strides):
            found.append(given[d])
    return sizes, strides


def _fold(channels: int, positions: int, itemsize: int) -> int:
    """How many channels to read as one row: the fewest that make rows of whole vectors and leave few lanes
    idle, else the best there is.
    """

    def cost(f: int) -> tuple[int, float]:
        length = f * positions
        block = power_of_two(length) if length <= LONGEST else BLOCK
        return -min(16, _unit(length) * itemsize), max(math.ceil(length / block) * block / length, 1.125)

    return min((f for f in (1, 2, 4, 8, 16) if channels % f == 0), key=lambda f: (*cost(f), f))


def matrix_view(
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    itemsize: int,
    *,
    is_map: bool = False,
    folded: bool = True,
) -> MatrixView:
    """The view over tensors (N, C, *S), or (N, *S) if ``is_map``, of that shape and those strides; ``folded``
    where that helps.
    """
    if is_map:
        shape, strides = (shape[0], 1, *shape[1:]), [(s[0], 0, *s[1:]) for s in strides]
    samples, channels = shape[0], shape[1]
    sizes, spatial = _spatial(shape[2:], [s[2:] for s in strides])
    positions = math.prod(sizes)
    outer = [(s[0] if samples > 1 else 0, s[1] if channels > 1 else 0) for s in strides]
    if len(sizes) > 1:
        padded = [1] * (3 - len(sizes)) + sizes
        every = tuple((*o, *([0] * (3 - len(sizes))), *s) for o, s in zip(outer, spatial))
        return MatrixView(
            samples, channels, positions, 1, padded[1], padded[2], False, False, 1, itemsize, every
        )
    along = [s[0] if s else 1 for s in spatial]
    rows_inner = channels > 1 and all(o[1] == 1 and (a != 1 or positions == 1) for o, a in zip(outer, along))
    fold = 1
    foldable = folded and not rows_inner and channels > 1
    if foldable and all(a == 1 and o[1] == positions for o, a in zip(outer, along)):
        fold = _fold(channels, positions, itemsize)
    rows, length = channels // fold, positions * fold
    outer = [(n, r * fold) for n, r in outer]
    if rows_inner:
        unit = _unit(rows, *(n for n, _ in outer), *along)
    else:
        unit = _unit(length, *(n for n, _ in outer), *((r for _, r in outer) if rows > 1 else ()))
    every = tuple((n, r, 0, 0, a) for (n, r), a in zip(outer, along))
    return MatrixView(samples, channels, positions, fold, 1, 1, True, rows_inner, unit, itemsize, every)


@dataclass(frozen=True)
class Grid:
    """How a sample's (rows, length) are divided: tiles (row_block, block), ``chunks`` runs of ``steps`` tiles
    for each position block.
    """

    row_block: int
    block: int
    blocks: int
    chunks: int
    steps: int

    @property
    def programs(self) -> int:
        """Of one sample."""
        return self.blocks * self.chunks


def fits(*counts: int) -> None:
    """Refuse a sample of more channels, positions or partial sums than its kernels can count."""
    if max(counts) > LARGEST:
        raise ValueError(f"a sample of {max(counts)} positions or channels is not served, at most {LARGEST}")


def program_bytes(total: int) -> int:
    """How much a program should read where a launch reads so much in all."""
    return min(max(total // PROGRAMS, LEAST), MOST)


def grid(w: MatrixView, goal: int) -> Grid:
    rows, length = power_of_two(w.rows), power_of_two(w.length)
    if w.rows_inner:
        row_block = min(rows, BLOCK)
        block = min(length, TILE // row_block)
    else:
        block = length if length <= LONGEST else BLOCK
        row_block = min(rows, TILE // block)
    tiles = math.ceil(w.rows / row_block)
    wanted = min(math.ceil(w.rows * block * w.itemsize / goal), tiles, CHUNKS)
    steps = math.ceil(tiles / wanted)
    chunks = math.ceil(tiles / steps)
    fits(w.rows, chunks * w.length)
    return Grid(row_block, block, math.ceil(w.length / block), chunks, steps)


def power(p: float, signed: bool) -> tuple[int, bool, bool, float, int]:
    """|x|^p (x^p if signed) for the kernels: (whole, half, signed, p, parity).

    p = whole + half / 2 is done by multiplications and a square root where it is small; else whole is 0, and
    parity tells the sign of a negative number's power: 1 negative, 2 positive, 0 none (NaN).
    """
    if not 1 <= p <= 16:
        raise ValueError(f"p must be from 1 to 16, got {p}")
    doubled = int(2 * p) if p <= 4 else 0
    if doubled == 2 * p and not (doubled % 2 and signed):
        return doubled // 2, bool(doubled % 2), signed, float(p), 0
    return 0, False, signed, float(p), 0 if p != int(p) else 2 - int(p) % 2


IDENTITY = (1, False, True, 1.0, 1)
"""The power of what is a map already: x itself, with the slope 1."""


def config(w: MatrixView, cut: Grid, p: tuple[int, bool, bool, float, int]) -> tuple:
    """What of a tensor is constant in a kernel: how it is seen, its tile, and the power. Flat, for Triton
    3.6: see common/tile.py.
    """
    return w.flat, w.rows_inner, w.unit, cut.row_block, cut.block, *p


def key_of(tensors: Sequence[Tensor]) -> tuple:
    return tuple([(x.dtype, x.shape, x.stride()) for x in tensors])


def served(x: Tensor, name: str, device: torch.device) -> None:
    """Refuse, in few words, what the kernels do not serve."""
    if x.dtype not in SERVED:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} lies on {x.device}, other tensors on {device}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty, got shape {tuple(x.shape)}")


class Plans(dict):
    """What was worked out for a key; forgotten all at once when shapes never come again."""

    def __setitem__(self, key: Any, plan: Any) -> None:
        if len(self) >= 1024:
            self.clear()
        super().__setitem__(key, plan)


class Launch:
    """One kernel, with everything but its pointers and numbers that change from call to call: ``constants``
    stand after those.
    """

    def __init__(self, kernel: Any, programs: int, *constants: Any, **options: int) -> None:
        if programs > MOST_PROGRAMS:
            raise ValueError(f"{kernel.__name__} would take {programs} programs, more than a launch has")
        self.kernel, self.grid, self.constants = kernel, (programs, 1, 1), constants
        self.options = OPTIONS | options
        self.compiled: dict[Any, Callable[..., None]] = {}

    def __call__(self, given: Sequence[Tensor], *args: Any) -> None:
        """Launch on the device of the tensors ``given`` by the user, whose alignment is not known beforehand.

        Raises :class:`NegativeView` if one of them is such a view.
        """
        device = given[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(device, given, args)
        return self._launch(device, given, args)

    def _launch(self, device: int, given: Sequence[Tensor], args: tuple) -> None:
        key = (device, *[None if x.is_neg() else x.data_ptr() % 16 for x in given])
        run = self.compiled.get(key)
        if run is not None:
            return run(*args, *self.constants)
        if None in key:
            raise NegativeView
        settle(self.kernel)
        compiled = self.kernel[self.grid](*args, *self.constants, **self.options)
        if compiled is not None:  # interpreted kernels are not compiled
            self.compiled[key] = compiled[self.grid]
