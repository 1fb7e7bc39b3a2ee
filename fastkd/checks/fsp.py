"""The arguments of FSP matrices and their loss."""

from __future__ import annotations

from torch import Tensor

from fastkd.checks.attention import POOL_MODE, REDUCE
from fastkd.checks.numbers import number, switch
from fastkd.checks.tensors import describe, feature, same_batch, same_rank, stage_pairs

DISTANCE = ("squared", "frobenius", "column_l2")
PRECISION = ("ieee", "tf32", "tf32x3", None)


def fsp_matrix(a: object, b: object, pool_mode: object, precision: object) -> None:
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("precision", precision, PRECISION)
    feature("a", a)
    feature("b", b)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    same_batch("a", a, "b", b)
    same_rank("a", a, "b", b, a.dim() - 2, b.dim() - 2)


def fsp_options(
    pool_mode: object, distance: object, pair_reduce: object, weight: object, precision: object
) -> None:
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("distance", distance, DISTANCE)
    switch("pair_reduce", pair_reduce, REDUCE)
    switch("precision", precision, PRECISION)
    number("weight", weight)


def fsp_loss(
    student: object,
    teacher: object,
    pool_mode: object,
    distance: object,
    pair_reduce: object,
    weights: object,
    weight: object,
    precision: object,
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    fsp_options(pool_mode, distance, pair_reduce, weight, precision)
    students, teachers = stage_pairs(student, teacher, weights, weight, least=2, what="pair")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: channels differ, FSP wanted"
                " the same number"
            )
    for name, chain in (("student", students), ("teacher", teachers)):
        for i, (a, b) in enumerate(zip(chain, chain[1:])):
            same_rank(f"{name}[{i}]", a, f"{name}[{i + 1}]", b, a.dim() - 2, b.dim() - 2)
    return students, teachers
