"""FSP matrices and the FSP loss over a chain, in one launch; their gradients, in another for each chain, are
in `fsp/gradient.py`.

Forward: a program makes a tile of a pair's dloss/dG of one sample: of G_s - G_t = (A_s - A_t) B_s^T + A_t
(B_s - B_t)^T where student and teacher have equal sizes after pooling, so that what they share is subtracted
before it is multiplied and rounded; of both products where they have not. It writes that tile for the
backward pass, and a number for the loss, which the last program adds up in a fixed order (a ticket tells it;
see `attention/loss.py`). For "column_l2" the last program of a column block makes its norms and divides by
them.

Backward: dA = upstream M B / S and dB = upstream M^T A / S, a tile of a feature's gradient a program, both
terms of a middle stage at once. Where a feature was averaged over windows, what lies in one shares a term; a
middle stage of two grids takes the coarser.

Products, and what is claimed for them. All sums are float32's. Blocks of features are read as they are,
subtracted and averaged in float32, and then multiplied:

- float32, "ieee": in float32, without tensor cores. As near as eager code, or better: the budget of the
  tests.
- float32, "tf32": rounded to nearest, to 10 bits, before. In the difference form, for maps 1e-2 apart, the
  loss is 0.03 % off, where the difference of two matrices would be 2 %.
- float32, "tf32x3": three such products of high and low parts; the tests' budget.
- bfloat16, whatever ``precision``: bfloat16 products. Features are exact there; differences, averages
  and dloss/dG are split in a high and a low part of 8 bits each, 2^-17 off at most (the difference of two
  bfloat16 numbers within a factor of 256 of each other not at all).
- float16, alone or with bfloat16: as float32, but "ieee" is "tf32x3". Numbers of either are exact in
  tf32, what is made of them is not.

``precision=None`` follows torch.backends.cuda.matmul.

Common pooling windows are fused (`fsp/view.py`). For others each pooled tensor takes one more launch forward
and one backward, and each such gradient one more.

Where a matrix would be larger than the features, as at 7x7 that of 1024 by 2048 channels, it is never in
memory (`fsp/saved.py` says when). Either neither pass makes it (`fsp/low_rank.py`): a program sums products
over a part of the channels, and the last of a sample adds the parts. Or each tile's program forgets it, and
the backward pass makes it again for each gradient: twice the products in all, and more where positions take
several blocks or a neighbour is averaged over windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._bits import FSP
from fastkd.kernels import interpreting
from fastkd.kernels.common.launch import Launch, Plans, key_of, power_of_two
from fastkd.kernels.fsp.forward_kernels import fsp_loss_kernel, fsp_matrix_kernel
from fastkd.kernels.fsp.gradient import fsp_loss_backward
from fastkd.kernels.fsp.saved import common_size, saved_shape, wide_stages
from fastkd.kernels.fsp.view import (
    Sources,
    added_up,
    checked,
    low_rank_tile,
    mode,
    options,
    owned,
    spills,
    tile,
    warps,
)

BLOCK = 256  # of the loss's last sum
PAIR_MEAN, WITH_GRAD, PREPARE = FSP.bits("pair_reduce", "mean"), FSP.bits("with_grad"), FSP.bits("prepare")

_plans = Plans()


class _Matrix:
    def __init__(self, a: Tensor, b: Tensor, pool_mode: str, how: str) -> None:
        self.sources = Sources((a, b), max_pool=pool_mode == "max")
        common = common_size(a, b)
        (self.a, a_view), (self.b, b_view) = (self.sources.add(i, common) for i in (0, 1))
        self.shape = a.shape[0], a.shape[1], b.shape[1]
        cut = tile(a.shape[1], b.shape[1], math.prod(common), how)
        columns = math.ceil(b.shape[1] / cut[1])
        tiles = math.ceil(a.shape[1] / cut[0]) * columns
        self.launch = Launch(
            fsp_matrix_kernel,
            a.shape[0] * tiles,
            a_view.numbers,
            b_view.numbers,
            tiles,
            columns,
            math.prod(common),
            (a_view.config, b_view.config),
            (cut,),
            how,
            interpreting(),
            **options(how, warps([cut], how)),
        )


def fsp_matrix(a: Tensor, b: Tensor, options: int) -> Tensor:
    """See ``torch.ops.fastkd.fsp_matrix``."""
    how = mode((a, b), FSP.value(options, "precision"))
    key = ("matrix", key_of((a, b)), options, how)
    plan = _plans.get(key)
    if plan is None:
        FSP.check(options)
        checked((a, b), "ab")
        plan = _plans[key] = _Matrix(a, b, FSP.value(options, "pool_mode"), how)
    if a.device != b.device:
        raise ValueError(f"a lies on {a.device}, b on {b.device}")
    given = [x for x, _ in plan.sources.made((a, b))]
    a, b, out = given[plan.a], given[plan.b], a.new_empty(plan.shape, dtype=torch.float32)
    plan.launch((a, b), a, b, out)
    return out


class _Loss:
    def __init__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], pool_mode: str, distance: str, how: str
    ) -> None:
        count, samples = len(student) - 1, student[0].shape[0]
        for i, (s, t) in enumerate(zip(student, teacher)):
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"stage {i}: student and teacher must have equal channels, got {s.shape[1]} and"
                    f" {t.shape[1]}"
                )
        self.sources = Sources((*student, *teacher), max_pool=pool_mode == "max")
        columns = distance == "column_l2"
        self.operands: list[int] = []
        pairs_of = [(student[i : i + 2], teacher[i : i + 2]) for i in range(count)]
        self.shapes = [saved_shape(*pair, distance) for pair in pairs_of]
        self.wide = wide_stages(self.shapes)
        views, cuts, sizes_of, tiles_of = [], [], [], []
        for i, ((a, b), _) in enumerate(pairs_of):
            sizes = [common_size(*side) for side in pairs_of[i]]
            for j in (i, i + 1, len(student) + i, len(student) + i + 1):
                place, seen = self.sources.add(j, sizes[j >= len(student)])
                self.operands.append(place)
                views.append(seen)
            heavy = [v.register_heavy for v in views[-4:]]
            if len(self.shapes[i]) == 4:
                cut = low_rank_tile(math.prod(sizes[0]), how, register_heavy=any(heavy))
            else:
                alone = not columns and sizes[0] == sizes[1]
                widest = 32 if all(v.scalar for v in views[-4:]) else 64 if any(heavy) or not alone else 128
                cut = tile(
                    a.shape[1],
                    b.shape[1],
                    max(map(math.prod, sizes)),
                    how,
                    register_heavy=any(heavy),
                    widest=widest,
                    costly_rows=alone and heavy == [True, False] * 2,
                )
            sizes_of.append(sizes)
            tiles_of.append(cut)
        many = warps(tiles_of, how, [cut for cut, shape in zip(tiles_of, self.shapes) if len(shape) == 4])

        pairs = []
        programs, scratch, tickets = 0, 0, 1
        self.terms = []  # what a distance is divided by
        for i, ((a, b), _) in enumerate(pairs_of):
            rows, more = a.shape[1], b.shape[1]
            sizes, cut = sizes_of[i], tiles_of[i]
            positions = [math.prod(size) for size in sizes]
            if len(self.shapes[i]) == 4:
                across, along = (math.ceil(positions[0] / n) for n in cut[:2])
                tiles = across * along
                # sums are a small part of what they are made of
                channels = max(power_of_two(6 * positions[0]), 256)
                a_parts, parts = (
                    math.ceil(rows / channels),
                    math.ceil(rows / channels) + math.ceil(more / channels),
                )
                units = samples * tiles
                sums = math.ceil((scratch + units) / 32)  # at a multiple of 128 bytes
                cuts.append((*cut, 2, channels, tiles == 1 and cut[0] == cut[1]))
                pairs.append(
                    (programs, tiles * parts, along, scratch, units, sums, tickets, positions[0], a_parts)
                )
                programs += units * parts
                scratch = 32 * sums + units * parts * 3 * cut[0] * cut[1]
                tickets += units
            else:
                if added_up(how, sizes[0] == sizes[1]):
                    cut = owned(cut, many, rows, more)
                cuts.append((*cut, int(sizes[0] == sizes[1]), 0, len(self.shapes[i]) == 2))
                row_tiles, column_tiles = math.ceil(rows / cut[0]), math.ceil(more / cut[1])
                units = samples * (column_tiles if columns else row_tiles * column_tiles)
                pairs.append(
                    (
                        programs,
                        row_tiles * column_tiles,
                        column_tiles,
                        scratch,
                        units,
                        scratch + units,
                        tickets,
                        *positions,
                    )
                )
                programs += samples * row_tiles * column_tiles
                scratch += units + (samples * row_tiles * more if columns else 0)
                tickets += units if columns else 0
            self.terms.append(samples * (rows * more if distance == "squared" else 1))
        self.scratch, self.tickets = scratch, tickets
        self.launch = Launch(
            fsp_loss_kernel,
            programs,
            tuple(v.numbers for v in views),
            tuple(pairs),
            samples,
            sum(p[4] for p in pairs),
            tuple(v.config for v in views),
            tuple(cuts),
            count,
            columns,
            BLOCK,
            how,
            interpreting(),
            **options(how, many, tight=spills(how)),
        )


def fsp_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: int, numbers: Sequence[float]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See ``torch.ops.fastkd.fsp_loss``."""
    upstream, weight, *weights = numbers
    tensors = (*student, *teacher)
    if len(student) < 2 or len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must hold equally many stages, at least 2, got {len(student)} and"
            f" {len(teacher)}"
        )
    if options & PREPARE and not options & WITH_GRAD:
        raise ValueError("prepare wants with_grad")
    how = mode(tensors, FSP.value(options, "precision"))
    key = ("loss", key_of(tensors), len(student), options, how)
    plan = _plans.get(key)
    if plan is None:
        FSP.check(options)
        checked(tensors, [f"{side}[{i}]" for side in ("student", "teacher") for i in range(len(student))])
        pool_mode, distance = FSP.value(options, "pool_mode"), FSP.value(options, "distance")
        plan = _plans[key] = _Loss(student, teacher, pool_mode, distance, how)
    first, count = tensors[0], len(student) - 1
    for x in tensors:
        if x.device != first.device:
            raise ValueError(f"tensors of one call lie on {first.device} and {x.device}")
    share = weight / count if options & PAIR_MEAN else weight
    if not weights:
        factors = tuple([share / terms for terms in plan.terms])
    elif len(weights) != count:
        raise ValueError(f"weights must hold one number a pair, got {len(weights)}")
    else:
        factors = tuple([share * w / terms for w, terms in zip(weights, plan.terms)])

    given = [x for x, _ in plan.sources.made(tensors)] if plan.sources.pools else tensors
    operands = tuple([given[i] for i in plan.operands])
    matrix_grads = (
        [first.new_empty(shape, dtype=torch.float32) for shape in plan.shapes] if options & WITH_GRAD else []
    )
    loss = first.new_empty((), dtype=torch.float32)
    plan.launch(
        operands,
        operands,
        tuple(matrix_grads) if options & WITH_GRAD else None,
        loss,
        first.new_empty(plan.scratch, dtype=torch.float32),
        first.new_zeros(plan.tickets, dtype=torch.int32),
        factors,
    )
    gradients = []
    if options & PREPARE:
        given_upstream = first.new_full((), upstream, dtype=torch.float32)
        others = [teacher[i] for i in plan.wide]
        gradients = fsp_loss_backward(
            given_upstream, student, matrix_grads, options, range(len(student)), others
        )
    return loss, matrix_grads, gradients
