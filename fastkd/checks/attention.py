"""The arguments of attention maps, taps and the losses of attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import errors
from fastkd.checks.numbers import number, power, stage_weights, switch
from fastkd.checks.tensors import describe, feature, fits, pairs_up, same_rank, stage_pairs

CHANNEL_REDUCE = ("mean", "sum")
EPS_MODE = ("clamp", "add")
POOL = ("before", "after")
POOL_MODE = ("avg", "max")
DIFFERENCE = ("squared", "l2")
REDUCE = ("sum", "mean")


def attention_map(x: object, p: object, channel_reduce: object, eps: object, eps_mode: object) -> None:
    feature("x", x)
    power(p)
    number("eps", eps, at_least=0)
    switch("channel_reduce", channel_reduce, CHANNEL_REDUCE)
    switch("eps_mode", eps_mode, EPS_MODE)


def relu_tap(
    x: object, residual: object, p: object, channel_reduce: object, eps: object, eps_mode: object
) -> None:
    attention_map(x, p, channel_reduce, eps, eps_mode)
    assert isinstance(x, Tensor)
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual is {type(residual).__name__}, wanted a tensor or None")
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual is {describe(residual)}, x is {describe(x)}: dtypes differ, wanted the same"
        )
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"residual is {describe(residual)}, x is {describe(x)}: wanted the same shape and device"
        )


def attention_options(
    p: object,
    channel_reduce: object,
    eps: object,
    eps_mode: object,
    pool: object,
    pool_mode: object,
    difference: object,
    stage_reduce: object,
    weight: object,
) -> None:
    power(p)
    number("eps", eps, at_least=0)
    number("weight", weight)
    switch("channel_reduce", channel_reduce, CHANNEL_REDUCE)
    switch("eps_mode", eps_mode, EPS_MODE)
    switch("pool", pool, POOL)
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("difference", difference, DIFFERENCE)
    switch("stage_reduce", stage_reduce, REDUCE)


def attention_transfer(
    student: object,
    teacher: object,
    p: object,
    channel_reduce: object,
    eps: object,
    eps_mode: object,
    pool: object,
    pool_mode: object,
    difference: object,
    stage_reduce: object,
    weights: object,
    weight: object,
    teacher_is_map: bool,
    student_is_map: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    attention_options(p, channel_reduce, eps, eps_mode, pool, pool_mode, difference, stage_reduce, weight)
    students, teachers = pairs_up(
        student, teacher, least=1, spatial_student=not student_is_map, spatial_teacher=not teacher_is_map
    )
    stage_weights(weights, len(students), "stage")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s_size, t_size = s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :]
        same_rank(f"student[{i}]", s, f"teacher[{i}]", t, len(s_size), len(t_size))
        if student_is_map:
            fits("student", i, s, s_size, "teacher", t, t_size)
        if teacher_is_map:
            fits("teacher", i, t, t_size, "student", s, s_size)
    return students, teachers


def one_position(
    students: Sequence[Tensor], teachers: Sequence[Tensor], teacher_is_map: bool, student_is_map: bool
) -> None:
    """Warns of stages whose maps have one position after pooling: such a map is a constant."""
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s_size, t_size = s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :]
        if all(min(a, b) == 1 for a, b in zip(s_size, t_size, strict=True)):
            errors.warn_once(
                f"attention_transfer_loss: student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: a"
                " normalized map of one position is constant, so this stage's loss teaches nothing; wanted a"
                " stage before the pooling"
            )


def tokens(
    operation: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    teacher_is_map: bool = False,
    student_is_map: bool = False,
) -> None:
    """Warns where features look like tokens (N, L, C) of a square grid, but are taken for (N, C, L)."""
    if torch.compiler.is_compiling():
        return
    for name, features, is_map in (
        ("student", students, student_is_map),
        ("teacher", teachers, teacher_is_map),
    ):
        for i, x in enumerate(() if is_map else features):
            side = math.isqrt(x.shape[1]) if x.dim() == 3 else 0
            # only tokens as a transformer lays them out, not a view of them with the channels first
            if side >= 4 and x.shape[1] - side * side in (0, 1) and x.shape[2] >= 64 and x.stride(2) == 1:
                errors.warn_once(
                    f"{operation}: {name}[{i}] is {describe(x)}, taken for {x.shape[1]} channels at"
                    f" {x.shape[2]} positions; if these are tokens (N, L, C) of a {side}x{side} grid, wanted"
                    " them as maps, by fastkd.tokens_to_map",
                    key=f"tokens {operation}",
                )
                return


def sakd_map(x: object, name: str = "x") -> None:
    feature(name, x)
    assert isinstance(x, Tensor)
    if x.dim() != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(f"{name} is {describe(x)}, wanted a square map (N, C, H, H)")


def sakd_loss(
    student: object, teacher: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    students, teachers = stage_pairs(student, teacher, weights, weight)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        sakd_map(s, f"student[{i}]")
        sakd_map(t, f"teacher[{i}]")
        if s.shape[2] != t.shape[2]:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: sizes differ, SAKD wanted the"
                " same H"
            )
    return students, teachers
