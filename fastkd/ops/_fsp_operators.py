"""The operators of the FSP loss: schemas, and what a graph must know of their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._bits import FSP
from fastkd.kernels.fsp.saved import matrix_shape, saved_shape, saved_shape_on_cpu
from fastkd.ops._register import define, differentiable_once, one_device
from fastkd.reference.common import accumulator

WITH_GRAD, PREPARE, NEGATE, TEACHER_GRAD = (
    FSP.bits(name) for name in ("with_grad", "prepare", "negate", "teacher_grad")
)


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], options: int, numbers: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    one_device(student + teacher)
    dtype, first = accumulator(student + teacher), student[0]
    pairs = zip(student, student[1:], strict=False) if options & WITH_GRAD else ()
    matrix_grads = [first.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=dtype) for a, b in pairs]
    gradients = [torch.empty_like(x) for x in student] if options & PREPARE else []
    return first.new_empty((), dtype=dtype), matrix_grads, gradients


def _loss_fake_by_device(
    student: list[Tensor], teacher: list[Tensor], options: int, numbers: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """On CUDA tensors Triton's, on others the C++ kernels': each may keep less."""
    loss, matrix_grads, gradients = _loss_fake(student, teacher, options, numbers)
    distance, teacher_grad = FSP.value(options, "distance"), FSP.value(options, "teacher_grad")
    pairs = [(student[i : i + 2], teacher[i : i + 2]) for i in range(len(matrix_grads))]
    if loss.device.type == "cuda":
        shapes = [saved_shape(*pair, distance) for pair in pairs]
    else:
        shapes = [saved_shape_on_cpu(*pair, distance, teacher_grad) for pair in pairs]
        if options & PREPARE and all(len(shape) == 3 for shape in shapes):
            shapes = [(sum(map(math.prod, shapes)),)]
    matrix_grads = [loss.new_empty(shape) for shape in shapes]
    return loss, matrix_grads, gradients


def apart(saved: Sequence[Tensor], student: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a forward pass saved, pair by pair, where all matrices came in one tensor."""
    if saved[0].dim() != 1:
        return saved
    sizes = [matrix_shape(pair) for pair in zip(student, student[1:])]
    pieces = saved[0].split([math.prod(size) for size in sizes])
    return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]


def _loss_backward_fake(
    grad: Tensor, features: list[Tensor], matrix_grads: Any, options: int, stages: list[int], others: Any
) -> list[Tensor]:
    return [torch.empty_like(features[i]) for i in stages]


define(
    # numbers: the upstream gradient to prepare for, the weight, and the weights of the pairs or none.
    # matrix_grads: one tensor a pair; beside gradients that were prepared on a CPU, all matrices in one
    "fsp_loss(Tensor[] student, Tensor[] teacher, int options, float[] numbers) -> (Tensor loss, Tensor[]"
    " matrix_grads, Tensor[] gradients)",
    _loss_fake_by_device,
    _loss_fake,
)
define(
    # others: the other chain's features of the stages whose matrices were not saved
    "fsp_loss_backward(Tensor grad, Tensor[] features, Tensor[] matrix_grads, int options, int[] stages,"
    " Tensor[] others) -> Tensor[]",
    _loss_backward_fake,
)
differentiable_once("fsp_loss_backward")
