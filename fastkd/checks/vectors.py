"""The arguments of losses of logits and of embeddings: KD, DKD, RKD, CRD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastkd.checks.numbers import above_zero, known_to_graph, number, switch
from fastkd.checks.tensors import describe, floating, same_batch

ACTIVATION = ("softmax", "sigmoid", "identity")
KD_REDUCTION = ("batchmean", "mean", "sum", "none")


def kd_loss(
    student_logits: object,
    teacher_logits: object,
    temperature: object,
    reduction: object,
    weight: object,
    activation: object = "softmax",
    mask: object = None,
) -> None:
    switch("reduction", reduction, KD_REDUCTION)
    switch("activation", activation, ACTIVATION)
    number("weight", weight)
    above_zero("temperature", temperature)
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        x = floating(name, x)
        if x.dim() not in (2, 2 if mask is None else 3) or 0 in x.shape:
            form = "(N, K)" if mask is None else "(N, K) or (N, L, K)"
            raise ValueError(f"{name} is {describe(x)}, wanted {form} with at least one sample and one class")
        if x.shape[-1] == 1 and activation == "softmax":
            raise ValueError(
                f"{name} is {describe(x)}: the softmax over one class is 1 and teaches nothing, "
                "wanted at least two (of one logit z, the two are z and 0), or activation='sigmoid'"
            )
    assert isinstance(student_logits, Tensor) and isinstance(teacher_logits, Tensor)
    same_batch("student_logits", student_logits, "teacher_logits", teacher_logits)
    if student_logits.shape[1:] != teacher_logits.shape[1:]:
        what = "class counts" if student_logits.dim() == teacher_logits.dim() == 2 else "shapes"
        raise ValueError(
            f"student_logits is {describe(student_logits)}, teacher_logits is {describe(teacher_logits)}: "
            f"{what} differ, wanted the same"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {given}, wanted a tensor of bool")
    if mask.shape != student_logits.shape[:-1] or mask.device != student_logits.device:
        raise ValueError(
            f"mask is {describe(mask)}, student_logits is {describe(student_logits)}: wanted its shape"
            " without the classes, on its device"
        )


def dkd_loss(
    student_logits: object,
    teacher_logits: object,
    labels: object,
    temperature: object,
    alpha: object,
    beta: object,
    weight: object,
) -> None:
    number("alpha", alpha)
    number("beta", beta)
    kd_loss(student_logits, teacher_logits, temperature, "batchmean", weight)
    assert isinstance(student_logits, Tensor)
    count, classes = student_logits.shape
    if classes == 2:
        raise ValueError(
            f"student_logits is {describe(student_logits)}: of two classes one alone is left beside the"
            " label, wanted at least three, or kd_loss"
        )
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = describe(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels is {given}, wanted a tensor of int64")
    if labels.shape != (count,) or labels.device != student_logits.device:
        raise ValueError(f"labels is {describe(labels)}, wanted ({count},) on {student_logits.device}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = (int(x) for x in labels.aminmax())
        if least < 0 or most >= classes:
            raise ValueError(
                f"labels has {least if least < 0 else most}, wanted 0 to {classes - 1}: there are {classes}"
                " classes"
            )


def rkd_loss(
    student: object, teacher: object, distance_weight: object, angle_weight: object, weight: object
) -> None:
    for name, value in (
        ("distance_weight", distance_weight),
        ("angle_weight", angle_weight),
        ("weight", weight),
    ):
        number(name, value)
    for name, x in (("student", student), ("teacher", teacher)):
        x = floating(name, x)
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(f"{name} is {describe(x)}, wanted (N, ...) with at least one number a sample")
        if x.shape[0] == 1:
            raise ValueError(f"{name} is {describe(x)}: one sample has no relations, wanted at least two")
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    same_batch("student", student, "teacher", teacher)


def crd_loss(
    student: object,
    teacher: object,
    student_bank: object,
    teacher_bank: object,
    rows: object,
    temperature: object,
    normalizers: object,
    eps: object,
    weight: object,
) -> None:
    """Checks everything but the values of ``rows``: see :func:`crd_rows`."""
    number("weight", weight)
    number("eps", eps, at_least=0)
    coldness = above_zero("temperature", temperature)
    pairs = (
        {"student": student, "teacher": teacher},
        {"student_bank": student_bank, "teacher_bank": teacher_bank},
    )
    for pair, form in zip(pairs, ("(N, D)", "(M, D)"), strict=True):
        _matrices(pair, form)
    assert isinstance(student, Tensor) and isinstance(student_bank, Tensor)
    if student.shape[1] != student_bank.shape[1] or student.device != student_bank.device:
        raise ValueError(
            f"student is {describe(student)}, student_bank is {describe(student_bank)}: wanted the same width"
            " and device"
        )
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows is {type(rows).__name__}, wanted a tensor")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows is {describe(rows)}, wanted int64")
    if (
        rows.dim() != 2
        or rows.shape[0] != student.shape[0]
        or rows.shape[1] < 2
        or rows.device != student.device
    ):
        raise ValueError(
            f"rows is {describe(rows)}, wanted ({student.shape[0]}, K + 1) on {student.device} with a"
            " positive and a negative at least"
        )
    _normalizers(normalizers, student.device)
    double = any(
        isinstance(x, Tensor) and x.dtype == torch.float64
        for x in (student, teacher, student_bank, teacher_bank, normalizers)
    )
    least = 1 / math.log(torch.finfo(torch.float64 if double else torch.float32).max / student_bank.shape[0])
    if not known_to_graph(temperature) and coldness < least:
        raise ValueError(
            f"temperature is {temperature!r}, wanted at least {least:.4f}: exp(1 / temperature) times the"
            " bank's rows overflows"
        )


def crd_rows(rows: Tensor, size: int, name: str = "rows") -> None:
    """Raises ValueError unless all ``rows`` are from 0 to ``size - 1``. On a GPU they are not checked: there
    Triton's kernel gives NaN, and plain PyTorch fails an assertion.
    """
    if rows.device.type == "cpu" and rows.numel():
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= size:
            raise ValueError(
                f"{name} has {least if least < 0 else most}, wanted rows 0 to {size - 1} of the bank"
            )


def crd_banks(student_bank: object, teacher_bank: object, normalizers: object) -> None:
    _matrices({"student_bank": student_bank, "teacher_bank": teacher_bank}, "(M, D)")
    assert isinstance(student_bank, Tensor)
    _normalizers(normalizers, student_bank.device)


def _matrices(pair: Mapping[str, object], form: str) -> None:
    """Two floating-point matrices of one shape on one device."""
    for name, x in pair.items():
        x = floating(name, x)
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(
                f"{name} is {describe(x)}, wanted {form} with at least one row and one number in it"
            )
    (name, x), (other_name, other) = pair.items()
    assert isinstance(x, Tensor) and isinstance(other, Tensor)
    if x.shape != other.shape or x.device != other.device:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: wanted the same shape and device"
        )


def _normalizers(value: object, device: torch.device) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(
                f"normalizers is {type(value).__name__}, wanted a tensor (2,), two numbers or None"
            )
        if len(value) != 2:
            raise ValueError(f"normalizers has {len(value)} numbers, wanted two")
        for i, each in enumerate(value):
            number(f"normalizers[{i}]", each)
        return
    value = floating("normalizers", value)
    if value.shape != (2,) or value.device != device:
        raise ValueError(f"normalizers is {describe(value)}, wanted two numbers (2,) on {device}")
