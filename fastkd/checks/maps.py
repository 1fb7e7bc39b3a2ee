"""The arguments of losses that compare maps number by number: OFD, HCL."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd.checks.tensors import describe, floating, stage_pairs, stages


def ofd_margin(weight: object, bias: object) -> None:
    for name, x in (("weight", weight), ("bias", bias)):
        _channels(name, x)
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    if weight.shape != bias.shape or weight.device != bias.device:
        raise ValueError(
            f"weight is {describe(weight)}, bias is {describe(bias)}: wanted the same channels and device"
        )


def ofd_margins(margins: object, *, values: bool) -> list[Tensor]:
    """The margins of each stage; ``values``: also that none is above 0, which waits for a GPU."""
    found = stages("margins", margins)
    for i, margin in enumerate(found):
        _channels(f"margins[{i}]", margin)
        if values and not bool((margin <= 0).all()):
            raise ValueError(f"margins[{i}] has {margin.max().item():.6g}, wanted numbers of at most 0")
    return found


def ofd_loss(
    student: object, teacher: object, margins: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors and of margins, or the error that says what is wrong."""
    students, teachers = stage_pairs(student, teacher, weights, weight)
    known = not torch.compiler.is_compiling() and students[0].device.type == "cpu"
    found = ofd_margins(margins, values=known)
    if len(found) != len(students):
        raise ValueError(f"margins has {len(found)}, wanted {len(students)}, one a stage")
    for i, (s, t, margin) in enumerate(zip(students, teachers, found, strict=True)):
        if s.shape != t.shape:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: shapes differ, wanted the"
                " same"
            )
        if margin.shape[0] != t.shape[1] or margin.device != t.device:
            raise ValueError(
                f"margins[{i}] is {describe(margin)}, teacher[{i}] is {describe(t)}: wanted one number a"
                " channel, on its device"
            )
    return students, teachers, found


def _channels(name: str, x: object) -> None:
    x = floating(name, x)
    if x.dim() != 1 or 0 in x.shape:
        raise ValueError(f"{name} is {describe(x)}, wanted (C,), one number a channel")


def hcl_loss(
    student: object, teacher: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    students, teachers = stage_pairs(student, teacher, weights, weight, what="level")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.dim() != 4:
            raise ValueError(f"student[{i}] is {describe(s)}, wanted (N, C, H, W)")
        if s.shape != t.shape:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: wanted the same shape"
            )
    return students, teachers
