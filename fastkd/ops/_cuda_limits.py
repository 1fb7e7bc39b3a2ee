"""What the CUDA library does not serve, and "" where it does. Its kernels check the rest, so that misuse is explained as everywhere."""

from __future__ import annotations

from torch import Tensor

MAX_STAGES = 16
"""Stages whose pointers and sizes go to a kernel by value."""


def attention_map(p: object) -> str:
    return "" if p == 2 else f"its kernels take p = 2, not {p}"


def attention_transfer_loss(student: object, teacher: object, p: object, teacher_is_map: object, student_is_map: object) -> str:
    students, teachers = _stages(student), _stages(teacher)
    if len(students) > MAX_STAGES:
        return f"its kernels take up to {MAX_STAGES} stages, not {len(students)}"
    for s, t in zip(students, teachers):
        if s.shape[1 if student_is_map else 2 :] != t.shape[1 if teacher_is_map else 2 :]:
            return "its kernels take student and teacher of equal spatial size"
    return attention_map(p)


def fsp_loss(student: object) -> str:
    stages = len(student) if isinstance(student, (list, tuple)) else 0
    return "" if stages <= MAX_STAGES else f"its kernels take up to {MAX_STAGES} stages, not {stages}"


def _stages(side: object) -> list[Tensor]:
    return [x for x in (side if isinstance(side, (list, tuple)) else (side,)) if isinstance(x, Tensor)]
