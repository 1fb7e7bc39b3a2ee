"""The RKD loss and its gradients: three launches, up to five of large batches, and nothing larger than a
matrix over the pairs of samples.

1. Lengths (`pair_kernels.py`). A program makes those of a tile of pairs of one side, by differences, and
   writes each twice, since the matrices are symmetric: half of a squared length in float64, its inverse in
   float32. Parts of their sums go to scratch memory.
2. Triples (`triple_kernels.py`). A program has the pairs (i, k) of a tile on or above the diagonal, and looks
   at every third sample l. A triangle's three lengths give its three angles by the law of cosines: that at l
   is a term of the loss, and what all three pull at the side between i and k is that pair's part of the
   gradient. Thus no program needs what another has found: no atomics, no (B, B, B), one matrix a side.
3. Gradients (`gradient_kernels.py`). The sum over k of matrix[i, k] (x_i - x_k), and what each length does to
   the mean. The first program adds up the loss.

**No products of matrices.** By a Gram matrix, which cuBLAS would make, a squared length is off by 2^-53 times
|x|^2 / |x_i - x_k|^2, and the cosine between two near samples by as much. Exact differences have no such
factor: a cosine by their lengths is off by 2^-53 times the ratio of two sides, which float32 cannot tell. And
products of the differences from each vertex, exact too, take B^3 D multiply-adds: 26e9 for two sides and one
gradient at B = 256, D = 512, against some 70 operations a triangle here, 0.6e9. So a plain form in PyTorch is
either inexact or slower.

**Precision.** What cancels is in float64: squared lengths, their sums in a triangle, and a gradient's matrix
with its sum over k. All else is float32. Of near samples large numbers in different entries of the matrix
cancel, so each is rounded to float32 alike in every tile that makes it, and never contracted with another.

**Tiles.** 8 x 8 x 16 triangles for 128 threads, 8 a thread: ptxas (Triton 3.8, sm_90) gives them 234
registers without a spill and 68 instructions a triangle; 4 a thread take 82 to 98 instructions and 148 or
more registers. Two programs thus share a multiprocessor, and B = 256 has 528, two rounds on an H200. With
both gradients 8 a thread are at the limit of registers (254), so 256 threads take 4 each. Pairs: 8 x 8 x 16
differences, and 16 x 16 x 8 from 512 samples on: half the numbers read, and a quarter of the sums. This was
reckoned, not measured.

**Sums.** Each program of the triples adds up the sums of all tiles of pairs, and each of the gradients what
all programs of the triples have found for the means. That costs no launch, but over all programs it is B^4
and B^3 D in bytes, where the work itself is B^3 and B^2 D. Where it is more than ``AGAIN``, a launch of one
program adds up those numbers before, and each reads one of a sum (`sum_kernels.py`). That depends on shapes
alone: which gradients are wanted changes no order of additions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.kernels.common.launch import Launch, Plans, key_of, power_of_two, served
from fastkd.kernels.limits import LARGEST, MOST_SAMPLES
from fastkd.kernels.rkd.gradient_kernels import rkd_gradient_kernel
from fastkd.kernels.rkd.pair_kernels import rkd_pairs_kernel
from fastkd.kernels.rkd.sum_kernels import rkd_sums_kernel
from fastkd.kernels.rkd.triple_kernels import rkd_triples_kernel

BLOCK = 8  # samples of a tile's side
LANES = 16  # third samples of a step; rows of matrices are filled up to whole steps
PAIRS, LARGE_PAIRS = (8, 16), (16, 8)  # samples of a side of a tile of pairs, and numbers of a step
LARGE = 512  # samples from which on those are large
RUN, COLUMNS = 4, 32  # samples of a step of a gradient, numbers of a program
ADDED = 256  # partial sums that are added at once
ADDED_ALONE = 1024  # of each row, by a program that does nothing else
# Bytes of partial sums that the programs of a launch may read, all of them together. A second-level cache of
# 5.5 TB/s gives these in 6 us. A launch between takes about as long: 1 to 2 us until it starts, as much until
# the next does, and its program waits for memory and for its warps. So lengths are added up before from 353
# samples on (34 MB; 352 have 31 MB, 256 have 9), where the triples take some 60 us; what the gradients read
# from 641 samples of 512 numbers on. Reckoned, not measured
AGAIN = 32 * 2**20


class _Plan:
    """What a call of these shapes takes."""

    def __init__(
        self, s: Tensor, t: Tensor, needs: tuple[bool, bool], has_distance: bool, has_angle: bool
    ) -> None:
        for name, x in (("s", s), ("t", t)):
            served(x, name, s.device)
            if x.dim() != 2 or len(x) != len(s):
                raise ValueError(f"{name} must be ({len(s)}, D), got {tuple(x.shape)}")
            if x.shape[1] > LARGEST:
                raise ValueError(f"{name} has {x.shape[1]} numbers a sample, wanted at most {LARGEST}")
        self.count = len(s)
        if self.count > MOST_SAMPLES:
            raise ValueError(f"s has {self.count} samples, wanted at most {MOST_SAMPLES}")
        self.pitch = math.ceil(self.count / LANES) * LANES
        blocks, (side, depth) = self.pitch // BLOCK, LARGE_PAIRS if self.count >= LARGE else PAIRS
        tiles, pair_tiles = _tiles(blocks), _tiles(self.pitch // side)
        # before the matrices: sums and counts of both sides' lengths, then parts of the loss and of what goes
        # through both means
        halves_at = math.ceil((4 * pair_tiles + 3 * tiles) / LANES) * LANES
        self.scratch = halves_at + 2 * self.pitch**2
        both = (s, t)
        shapes = [(x.shape[1], *x.stride()) for x in both]
        depths = [min(depth, power_of_two(x.shape[1])) for x in both]
        columns = [min(COLUMNS, power_of_two(x.shape[1])) for x in both]
        grad_shapes = [_empty(x, "meta").stride() for x in both]
        every = [
            math.ceil(self.count / BLOCK) * math.ceil(x.shape[1] / wide)
            for x, wide in zip(both, columns, strict=True)
        ]
        programs = [need * of_side for need, of_side in zip(needs, every, strict=True)]
        # what is written is what runs: of equal sides nothing is left
        exact = {"enable_fp_fusion": False}
        self.pair_sums: Launch | None = None
        self.triple_sums: Launch | None = None
        pair_numbers, numbers = pair_tiles, tiles  # of each sum, for those who read it
        if 4 * 8 * pair_tiles * tiles > AGAIN:
            self.pair_sums = _adding(0, pair_tiles, 0b1111)
            pair_numbers = 1
        if has_distance and 8 * tiles * min(every) > AGAIN:  # a gradient of the narrower side
            wanted = 1 | needs[0] << 1 | needs[1] << 2
            self.triple_sums = _adding(4 * pair_numbers, tiles, wanted)
            numbers = 1
        self.pairs = Launch(
            rkd_pairs_kernel,
            2 * pair_tiles,
            *shapes,
            halves_at,
            self.count,
            self.pitch // side,
            side,
            *depths,
            **exact,
        )
        self.triples = Launch(
            rkd_triples_kernel,
            tiles,
            halves_at,
            blocks,
            pair_numbers,
            BLOCK,
            LANES,
            ADDED,
            has_angle,
            has_distance,
            num_warps=8 if all(needs) else 4,
            **exact,
        )
        self.gradient = Launch(
            rkd_gradient_kernel,
            max(sum(programs), 1),
            *shapes,
            *grad_shapes,
            self.count,
            blocks,
            pair_numbers,
            numbers,
            *programs,
            BLOCK,
            RUN,
            *columns,
            ADDED,
            has_distance,
            **exact,
        )


def _adding(first: int, count: int, wanted: int) -> Launch:
    """The launch that adds up rows of partial sums in scratch memory."""
    return Launch(rkd_sums_kernel, 1, first, count, wanted, ADDED_ALONE, num_warps=8, enable_fp_fusion=False)


def _tiles(blocks: int) -> int:
    """Those on and above the diagonal."""
    return blocks * (blocks + 1) // 2


def _empty(x: Tensor, device: str | torch.device) -> Tensor:
    """For the gradient of x, laid out as x is."""
    return torch.empty_like(x, dtype=torch.float32, device=device)


_plans = Plans()


def rkd_pass(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``torch.ops.fastkd.rkd_pass``."""
    needs = need_s, need_t
    key = (key_of((s, t)), needs, distance != 0, angle != 0)
    known = _plans.get(key)
    plan = _Plan(s, t, needs, distance != 0, angle != 0) if known is None else known
    if s.device != t.device:
        raise ValueError(f"tensors of one call lie on {s.device} and {t.device}")
    if known is None:
        _plans[key] = plan

    loss = s.new_empty((), dtype=torch.float32)
    grads = [
        _empty(x, x.device) if need else x.new_empty(0, dtype=torch.float32)
        for x, need in zip((s, t), needs, strict=True)
    ]
    scratch = s.new_empty(plan.scratch, dtype=torch.float64)
    inverses = s.new_empty(2 * plan.pitch**2, dtype=torch.float32)
    matrices: Sequence[Tensor | None] = [
        s.new_empty(plan.pitch**2, dtype=torch.float64) if need else None for need in needs
    ]
    factors = angle / plan.count**3, distance / plan.count**2
    plan.pairs((s, t), s, t, scratch, inverses)
    if plan.pair_sums is not None:
        plan.pair_sums((scratch,), scratch)
    plan.triples((scratch,), scratch, inverses, *matrices, *factors)
    if plan.triple_sums is not None:
        plan.triple_sums((scratch,), scratch)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    plan.gradient((s, t), s, t, scratch, inverses, *matrices, loss, *wanted, factors[1])
    return loss, grads[0], grads[1]
