"""The attention-transfer loss over a list of stages, in one launch forward and one backward.

Forward: a program sums the powers of some channels over a block of positions, of one sample, stage and
side, into scratch memory, and takes a ticket. The last program of a (sample, stage) adds the parts in their
order, normalizes both maps, compares them and writes the coefficients that the backward pass streams; the
last of these adds up the loss. Student, teacher, normalization and comparison are thus one pass over the
features, with as many programs as the bandwidth needs: for 64x256x56x56 in float32 13 position blocks x 64
samples x 2 sides of 256 KiB each, for 128x16x32x32 two of 32 KiB a sample and side. A ticket instead of a
second launch: that would cost the host more than zeroing the tickets, and the device the time in which the
first drains. Tickets are integers and choose who adds, never in which order. Stages come in the order of
their maps' size, the longest to finish first. Scratch memory is a map for each side and chunk.

Backward: dx = upstream k h(x) for every feature that needs it, k a coefficient a position, tile by tile.

Where sizes differ, a side is pooled by a launch of its own before (`common/pool.py`), and its gradient
un-pooled by another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._bits import ATTENTION
from fastkd.kernels.attention.loss_gradient import attention_transfer_loss_backward
from fastkd.kernels.attention.loss_kernels import loss_kernel
from fastkd.kernels.attention.map import attention_map
from fastkd.kernels.common.launch import (
    IDENTITY,
    LONGEST,
    Launch,
    Plans,
    config,
    grid,
    key_of,
    matrix_view,
    power,
    power_of_two,
    program_bytes,
    served,
)
from fastkd.kernels.common.pool import pool, unpool
from fastkd.kernels.common.windows import pooled_strides

(
    MEAN,
    SIGNED,
    ADD_EPS,
    POOL_BEFORE,
    POOL_MAX,
    L2,
    STAGE_MEAN,
    TEACHER_IS_MAP,
    STUDENT_IS_MAP,
    STUDENT_GRAD,
    TEACHER_GRAD,
    PREPARE,
) = (ATTENTION.bits(name, values[1]) for name, values in ATTENTION.choices.items())


class _Side:
    """One side of one stage: whether and how it is pooled, and how what comes of that is seen as a matrix."""

    def __init__(self, x: Tensor, is_map: bool, size: Sequence[int], p: float, options: int) -> None:
        own, channels = x.shape[1 if is_map else 2 :], 1 if is_map else x.shape[1]
        # a power sum or a map is taken as it is, and the gradient of a power sum is still that of the power
        # before it
        self.pooled = "" if tuple(own) == tuple(size) else "before" if options & POOL_BEFORE else "after"
        raw = is_map or self.pooled == "after"
        share = channels if options & MEAN else 1
        self.power = IDENTITY if raw else power(p, bool(options & SIGNED))
        self.divisor = 1.0 if raw else float(share)
        self.gain = 1.0 if is_map else p / share
        self.is_map = is_map
        self.coefficient = (
            tuple(x.shape) if is_map else (x.shape[0], *(size if self.pooled != "after" else own))
        )
        self.target = (x.shape[0], *size) if raw else (*x.shape[:2], *size)
        if not self.pooled:
            self.view = matrix_view(x.shape, [x.stride()], x.element_size(), is_map=is_map)
        elif raw:
            self.view = matrix_view(
                self.target, [torch.empty(self.target, device="meta").stride()], 4, is_map=True
            )
        else:
            self.view = matrix_view(self.target, [pooled_strides(x, self.target)], 4)


class _Forward:
    """What a forward call of these shapes takes."""

    def __init__(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor], p: float, eps: float, options: int
    ) -> None:
        if not students or len(students) != len(teachers):
            raise ValueError(
                f"student and teacher must be lists of the same length, at least 1, got {len(students)} and"
                f" {len(teachers)}"
            )
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        ATTENTION.check(options)
        s_map, t_map = bool(options & STUDENT_IS_MAP), bool(options & TEACHER_IS_MAP)
        self.samples = students[0].shape[0]
        self.sides: list[tuple[_Side, _Side]] = []
        for s, t in zip(students, teachers, strict=True):
            sizes = []
            for x, is_map, name in ((s, s_map, "student"), (t, t_map, "teacher")):
                served(x, name, students[0].device)
                if not 3 <= x.dim() + is_map <= 5 or x.shape[0] != self.samples:
                    raise ValueError(f"{name} has shape {tuple(x.shape)}: wrong in rank or batch size")
                sizes.append(x.shape[1 if is_map else 2 :])
            if len(sizes[0]) != len(sizes[1]):
                raise ValueError("student and teacher differ in the number of spatial dimensions")
            size = tuple(min(a, b) for a, b in zip(*sizes))
            if (s_map and sizes[0] != size) or (t_map and sizes[1] != size):
                raise ValueError("a map must not be larger than the other side")
            self.sides.append((_Side(s, s_map, size, p, options), _Side(t, t_map, size, p, options)))

        goal = program_bytes(sum(side.view.bytes for pair in self.sides for side in pair))
        first, at, stages = 0, 0, []
        configs: list[list[tuple]] = [[], []]
        # the largest stages first: they take longest to finish. Programs are numbered in that order, stages
        # keep their places
        numbered: dict[int, tuple[int, ...]] = {}
        for i in sorted(range(len(students)), key=lambda i: -self.sides[i][0].view.positions):
            numbers = [first, self.sides[i][0].view.positions]
            for side in self.sides[i]:
                cut = grid(side.view, goal)
                parts = cut.chunks * side.view.fold
                numbers += [cut.programs, cut.blocks, cut.steps, parts, at]
                at += self.samples * parts * side.view.positions
            first += self.samples * (numbers[2] + numbers[7])
            numbered[i] = tuple(numbers)
        for i, pair in enumerate(self.sides):
            stages.append(numbered[i])
            for row, side in zip(configs, pair):
                cut = grid(side.view, goal)
                row.append(config(side.view, cut, side.power))
        self.scratch = at + len(students) * self.samples
        self.tickets = 1 + len(students) * self.samples
        # what the distances are divided by
        self.terms = [self.samples * (1 if options & L2 else pair[0].view.positions) for pair in self.sides]
        self.pools = any(side.pooled for pair in self.sides for side in pair)
        self.grads = bool(options & STUDENT_GRAD), bool(options & TEACHER_GRAD)
        block = min(LONGEST, power_of_two(max(pair[0].view.positions for pair in self.sides)))
        self.launch = Launch(
            loss_kernel,
            first,
            tuple(pair[0].view.numbers() for pair in self.sides),
            tuple(pair[1].view.numbers() for pair in self.sides),
            tuple(stages),
            tuple((s.divisor, s.gain, t.divisor, t.gain) for s, t in self.sides),
            self.samples,
            at,
            tuple(configs[0]),
            tuple(configs[1]),
            len(students),
            block,
            float(eps),
            bool(options & ADD_EPS),
            bool(options & L2),
            s_map,
            t_map,
        )


_plans = Plans()


def attention_transfer_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: int, numbers: Sequence[float]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See ``torch.ops.fastkd.attention_transfer_loss``."""
    upstream, p, eps, weight, *weights = numbers
    tensors = (*student, *teacher)
    key = (key_of(tensors), len(student), p, eps, options)
    known = _plans.get(key)
    plan = _Forward(student, teacher, p, eps, options) if known is None else known
    first = tensors[0]
    for x in tensors:
        if x.device != first.device:
            raise ValueError(f"tensors of one call lie on {first.device} and {x.device}")
    share = weight / len(student) if options & STAGE_MEAN else weight
    if not weights:
        factors = tuple([share / terms for terms in plan.terms])
    elif len(weights) != len(student):
        raise ValueError(f"weights must hold one number a stage, got {len(weights)}")
    else:
        factors = tuple([share * w / terms for w, terms in zip(weights, plan.terms)])
    if known is None:
        _plans[key] = plan

    wanted = [(i, j) for j in (0, 1) if plan.grads[j] for i in range(len(student))]
    coefficients = [first.new_empty(plan.sides[i][j].coefficient, dtype=torch.float32) for i, j in wanted]
    given, targets = tensors, coefficients
    unpooled: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
    if plan.pools:
        given, targets, unpooled = _pooled(plan, tensors, wanted, coefficients, p, options)
    count = len(student) if plan.grads[0] else 0
    loss = first.new_empty((), dtype=torch.float32)
    plan.launch(
        given,
        given[: len(student)],
        given[len(student) :],
        tuple(targets[:count]) if plan.grads[0] else None,
        tuple(targets[count:]) if plan.grads[1] else None,
        loss,
        first.new_empty(plan.scratch, dtype=torch.float32),
        first.new_zeros(plan.tickets, dtype=torch.int32),
        factors,
    )
    for pooled, place, k, full in unpooled:
        unpool(k, place, full, max_pool=bool(options & POOL_MAX), like=pooled)
    gradients = []
    if options & PREPARE and plan.grads[0] and not options & STUDENT_IS_MAP:
        grad = first.new_full((), upstream, dtype=torch.float32)
        gradients = attention_transfer_loss_backward(grad, student, coefficients[:count], p, options)
    return loss, coefficients, gradients


def _pooled(
    plan: _Forward,
    tensors: Sequence[Tensor],
    wanted: list[tuple[int, int]],
    coefficients: list[Tensor],
    p: float,
    options: int,
) -> tuple[tuple[Tensor, ...], list[Tensor], list[tuple[Tensor, Tensor | None, Tensor, Tensor]]]:
    """The features, pooled before or after the power; where coefficients are to be written; and which of
    those are to be un-pooled.
    """
    stages = len(plan.sides)
    given, targets = list(tensors), list(coefficients)
    unpooled: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
    for i in range(stages):
        for j, side in enumerate(plan.sides[i]):
            x = tensors[j * stages + i]
            if side.pooled == "before":
                given[j * stages + i] = pool(x, side.target, max_pool=bool(options & POOL_MAX))[0]
            elif side.pooled == "after":
                reduce = "mean" if options & MEAN else "sum"
                q = attention_map(x, p, reduce, bool(options & SIGNED), False, 0.0, "clamp")[0]
                pooled, place = pool(
                    q.unsqueeze(1), (q.shape[0], 1, *side.target[1:]), max_pool=bool(options & POOL_MAX)
                )
                given[j * stages + i] = pooled.squeeze(1)
                if (i, j) in wanted:
                    k = torch.empty_like(pooled)
                    at = wanted.index((i, j))
                    targets[at] = k
                    unpooled.append((pooled, place, k, coefficients[at]))
    return tuple(given), targets, unpooled
