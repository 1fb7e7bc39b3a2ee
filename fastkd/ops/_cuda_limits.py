"""Why the CUDA library does not serve a call, or "" where it does. Its kernels check the arguments, so that
misuse is explained as everywhere.

Each function takes the arguments and options of a call as :func:`fastkd.backends.select` gets them.
"""

from __future__ import annotations

from fastkd._implementations import tensors_in
from fastkd.kernels.limits import NO_KERNEL

MAX_STAGES = 16
"""Stages whose pointers and sizes go to a kernel by value."""


def none(arguments: tuple, options: tuple) -> str:
    return ""


def no_kernel(arguments: tuple, options: tuple) -> str:
    return NO_KERNEL


def attention_map(arguments: tuple, options: tuple) -> str:
    p = options[0]
    return "" if p == 2 else f"its kernels take p = 2, not {p}"


def attention_transfer_loss(arguments: tuple, options: tuple) -> str:
    students, teachers = (tensors_in([side]) for side in arguments)
    if len(students) > MAX_STAGES:
        return f"its kernels take up to {MAX_STAGES} stages, not {len(students)}"
    teacher_is_map, student_is_map = options[-2:]
    for s, t in zip(students, teachers):
        if s.shape[1 if student_is_map else 2 :] != t.shape[1 if teacher_is_map else 2 :]:
            return "its kernels take student and teacher of equal spatial size"
    return attention_map(arguments, options)


def fsp_loss(arguments: tuple, options: tuple) -> str:
    student = arguments[0]
    stages = len(student) if isinstance(student, (list, tuple)) else 0
    return "" if stages <= MAX_STAGES else f"its kernels take up to {MAX_STAGES} stages, not {stages}"
