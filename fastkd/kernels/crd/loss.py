"""The CRD loss and its gradients in one pass over the drawn rows of two banks: three launches, and no tensor
(B, K + 1, D).

Each image's K + 1 rows are divided among programs, in parts. A program reads a tile of rows, and of it makes
scores, exponentials, terms of the loss, slopes and its share of the gradient, before it reads the next: each
drawn row is read once. The positive belongs to the first part. A last launch adds the parts of the loss and
of the gradients in their order, in float64.

Normalizers are on the device, and whether they are known is not asked: a launch before the pass adds up the
exponentials of all rows of a side without one. Of a side that has one its programs end at once. Each program
of the pass adds up those programs' sums for itself, B^2 in bytes in all. A method does that once, with its
first batch; where B is 1024 and K 16,384 they are a seventh of the rows' bytes.

The tile has 2048 numbers for 128 threads: 4 rows of 128 float32 numbers a warp, all under way at once. The
sums of the gradient are held beside it, 16 registers a thread, and added across rows only when the part ends.
ptxas gives a thread 79 registers on sm_90 and 72 on sm_80, so that six programs share a multiprocessor, and
48 KiB of rows are under way, where bandwidth times latency asks for 29 (`common/launch.py`). With 4096
numbers it takes 158, for three programs. A warp spends about 75 instructions on a row of 128 numbers, 19
cycles of a multiprocessor, in which a second-level cache of 5.5 TB/s gives each of 132 a row in 16 (at 1.7
GHz): neither waits long for the other. At N = 50,000, K = 16,384, B = 64, D = 128 each side reads 537 MB of a
bank of 26 MB, most of it from that cache: programs are numbered side by side, so that one bank at a time is
there. A part has at most 512 KiB of rows: 17 parts of an image, 2176 programs. This was reckoned, not
measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.kernels.common.launch import Launch, Plans, key_of, power_of_two, program_bytes, served
from fastkd.kernels.crd.loss_kernels import crd_loss_kernel, crd_odds_kernel, crd_sum_kernel
from fastkd.kernels.limits import LARGEST, WIDEST

TILE = 2048
MOST_ROWS = 512  # of a tile of narrow embeddings
ADDED = 256  # numbers of a gradient that a program of the last launch adds up
BLOCK = 1024  # numbers of the loss or of a normalizer that are added at once


def tile_of(width: int, drawn: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program's tile. Rows that are no whole vectors of 16 bytes are read number
    by number, each by a pointer of two registers: half as many.
    """
    columns = power_of_two(width)
    numbers = TILE if width * itemsize % 16 == 0 else TILE // 2
    rows = min(max(numbers // columns, 1), MOST_ROWS, power_of_two(drawn + 1))
    return rows, columns, max(4, min(columns // 512, 16))


def divide(count: int, drawn: int, row_bytes: int, rows: int) -> tuple[int, int]:
    """Parts of an image's rows, and steps of a part, tiles of so many rows."""
    image, tiles = (drawn + 1) * row_bytes, math.ceil((drawn + 1) / rows)
    wanted = min(math.ceil(image / program_bytes(2 * count * image)), tiles)
    steps = math.ceil(tiles / wanted)
    return math.ceil(tiles / steps), steps


class _Plan:
    """What a call of these shapes takes."""

    def __init__(
        self,
        s: Tensor,
        t: Tensor,
        s_bank: Tensor,
        t_bank: Tensor,
        rows: Tensor,
        given: Tensor,
        needs: tuple[bool, bool],
    ) -> None:
        for name, x in (("s", s), ("t", t), ("s_bank", s_bank), ("t_bank", t_bank)):
            served(x, name, s.device)
            if x.dim() != 2 or not x.is_contiguous():
                raise ValueError(f"{name} must be a contiguous matrix, got {tuple(x.shape)} of {x.stride()}")
        if not s.dtype == t.dtype == given.dtype == torch.float32 or s_bank.dtype != t_bank.dtype:
            raise TypeError(
                f"s, t and given must be float32 and both banks of one dtype, got {s.dtype}, {t.dtype},"
                f" {given.dtype}, {s_bank.dtype} and {t_bank.dtype}"
            )
        self.count, self.width = s.shape
        if t.shape != s.shape or t_bank.shape != s_bank.shape or s_bank.shape[1] != self.width:
            raise ValueError(
                f"s, t, s_bank and t_bank are {[tuple(x.shape) for x in (s, t, s_bank, t_bank)]}: wanted"
                " (B, D) twice and (M, D) twice"
            )
        if self.width > WIDEST:
            raise ValueError(f"s has embeddings of {self.width} numbers, wanted at most {WIDEST}")
        if (
            rows.dtype != torch.int64
            or rows.dim() != 2
            or rows.shape[0] != self.count
            or rows.shape[1] < 2
            or not rows.is_contiguous()
        ):
            raise ValueError(
                f"rows must be contiguous int64 ({self.count}, K + 1), got {rows.dtype} {tuple(rows.shape)}"
            )
        if rows.shape[1] > LARGEST:
            raise ValueError(f"rows has {rows.shape[1]} rows an image, wanted at most {LARGEST}")
        if given.shape != (2,) or not given.is_contiguous():
            raise ValueError(f"given must be two numbers beside each other, got {tuple(given.shape)}")
        self.drawn, self.size = rows.shape[1] - 1, len(s_bank)
        tile_rows, columns, warps = tile_of(self.width, self.drawn, s_bank.element_size())
        self.parts, steps = divide(self.count, self.drawn, self.width * s_bank.element_size(), tile_rows)
        self.programs = 2 * self.count * self.parts
        counts = self.count, self.drawn, self.size, self.parts, steps
        shape = tile_rows, columns, self.width
        self.odds = Launch(crd_odds_kernel, self.programs, *counts, *shape, num_warps=warps)
        self.scores = Launch(crd_loss_kernel, self.programs, *counts, *shape, BLOCK, *needs, num_warps=warps)
        self.numbers = self.count * self.width
        blocks = math.ceil(self.numbers / ADDED)
        self.added = Launch(
            crd_sum_kernel,
            1 + sum(needs) * blocks,
            self.count,
            self.parts,
            self.numbers,
            blocks,
            ADDED,
            BLOCK,
        )


_plans = Plans()


def crd_pass(
    s: Tensor,
    t: Tensor,
    s_bank: Tensor,
    t_bank: Tensor,
    rows: Tensor,
    given: Tensor,
    temperature: float,
    eps: float,
    weight: float,
    need_s: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``torch.ops.fastkd.crd_pass``; the banks may be float16 or bfloat16 too. A row that is not in the
    banks makes loss and gradient NaN.
    """
    tensors = s, t, s_bank, t_bank, rows, given
    key = (key_of(tensors), need_s, need_t)
    known = _plans.get(key)
    plan = _Plan(*tensors, (need_s, need_t)) if known is None else known
    for x in tensors:
        if x.device != s.device:
            raise ValueError(f"tensors of one call lie on {s.device} and {x.device}")
    if known is None:
        _plans[key] = plan
    return _launch(plan, tensors, temperature, eps, weight, (need_s, need_t))


def _launch(
    plan: _Plan,
    tensors: Sequence[Tensor],
    temperature: float,
    eps: float,
    weight: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, t, given = tensors[0], tensors[1], tensors[-1]
    noise, factor = plan.drawn / plan.size, weight / plan.count
    sharpness = math.log2(math.e) / temperature  # exponentials are powers of two
    scale = plan.size / (plan.count * (plan.drawn + 1))
    loss, found = s.new_empty(()), s.new_empty(2)
    grads = [torch.empty_like(x) if need else x.new_empty(0) for x, need in zip((s, t), needs, strict=True)]
    sums = s.new_empty(2 * plan.programs)  # of the programs, of exponentials and then of the loss
    partial = s.new_empty(2 * plan.parts * plan.numbers) if any(needs) else None
    plan.odds(tensors, *tensors, sums, sharpness)
    plan.scores(
        tensors, *tensors, sums, partial, sharpness, scale, 1 / noise, eps / noise, math.log(noise + eps)
    )
    plan.added(
        (given,),
        given,
        sums,
        partial,
        loss,
        found,
        grads[0] if needs[0] else None,
        grads[1] if needs[1] else None,
        scale,
        factor,
        factor / temperature,
    )
    return loss, found, grads[0], grads[1]
