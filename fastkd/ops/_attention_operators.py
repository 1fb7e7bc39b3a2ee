"""The operators of the attention-transfer loss: schemas, and what a graph must know of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._bits import ATTENTION
from fastkd.ops._register import define, differentiable_once, one_device, smaller
from fastkd.reference.common import accumulator

POOL_BEFORE = ATTENTION.bits("pool", "before")
STUDENT_IS_MAP, TEACHER_IS_MAP, STUDENT_GRAD, TEACHER_GRAD, PREPARE = (
    ATTENTION.bits(name)
    for name in ("student_is_map", "teacher_is_map", "student_grad", "teacher_grad", "prepare")
)


def _coefficient_size(x: Tensor, is_map: bool, other: Sequence[int], options: int) -> list[int]:
    if is_map:
        return list(x.shape)
    return [x.shape[0], *(smaller(x.shape[2:], other) if options & POOL_BEFORE else x.shape[2:])]


def _are_joined(student: Sequence[Tensor], teacher: Sequence[Tensor], options: int) -> bool:
    """Whether the coefficients come in one tensor: beside prepared gradients, where no teacher wants its own,
    and every stage of the student has several positions and is not pooled.
    """
    if not options & PREPARE or options & TEACHER_GRAD:
        return False
    first = 1 if options & TEACHER_IS_MAP else 2
    return all(
        list(s.shape[2:]) == smaller(s.shape[2:], t.shape[first:]) and math.prod(s.shape[2:]) > 1
        for s, t in zip(student, teacher)
    )


def apart(coefficients: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
    """Coefficients that came in one tensor, feature by feature."""
    sizes = [(x.shape[0], *x.shape[2:]) for x in features]
    pieces = coefficients.split([math.prod(size) for size in sizes])
    return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], options: int, numbers: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    one_device(student + teacher)
    dtype = accumulator(student + teacher)
    s_map, t_map = bool(options & STUDENT_IS_MAP), bool(options & TEACHER_IS_MAP)
    sizes = []
    if options & STUDENT_GRAD:
        sizes += [
            _coefficient_size(s, s_map, t.shape[1 if t_map else 2 :], options)
            for s, t in zip(student, teacher)
        ]
    if options & TEACHER_GRAD:
        sizes += [
            _coefficient_size(t, t_map, s.shape[1 if s_map else 2 :], options)
            for s, t in zip(student, teacher)
        ]
    prepares = options & PREPARE and options & STUDENT_GRAD and not s_map
    # the C++ kernels' coefficients; others give a tensor a feature
    if prepares and student[0].device.type != "cuda" and _are_joined(student, teacher, options):
        sizes = [[sum(map(math.prod, sizes))]]
    return (
        student[0].new_empty((), dtype=dtype),
        [student[0].new_empty(size, dtype=dtype) for size in sizes],
        [torch.empty_like(x) for x in student] if prepares else [],
    )


def _loss_backward_fake(
    grad: Tensor, features: list[Tensor], coefficients: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


define(
    # numbers: the upstream gradient to prepare for, p, eps, weight, and the weights of the stages or none.
    # coefficients: one tensor a feature, or the student's in one, see _are_joined
    "attention_transfer_loss(Tensor[] student, Tensor[] teacher, int options, float[] numbers) -> (Tensor"
    " loss, Tensor[] coefficients, Tensor[] gradients)",
    _loss_fake,
)
define(
    "attention_transfer_loss_backward(Tensor grad, Tensor[] features, Tensor[] coefficients, float p, int"
    " options) -> Tensor[]",
    _loss_backward_fake,
)
differentiable_once("attention_transfer_loss_backward")
