"""The losses as users of plain PyTorch write them, in the dtype of the features: what the kernels are
compared with.

They follow the published code, apart from `flatten` in place of `view`, which refuses channels_last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from speed.cases import FORWARD, Case
from speed.measure import both_passes

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]


def _map(x: Tensor) -> Tensor:
    return F.normalize(x.pow(2).mean(1).flatten(1))


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Any:
    """Zagoruyko's and RepDistiller's attention transfer."""
    return sum((_map(s) - _map(t)).pow(2).mean() for s, t in zip(student, teacher))


def _smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape[2] > b.shape[2]:
        a = F.adaptive_avg_pool2d(a, (b.shape[2], b.shape[3]))
    elif a.shape[2] < b.shape[2]:
        b = F.adaptive_avg_pool2d(b, (a.shape[2], a.shape[3]))
    return a, b


def _matrix(a: Tensor, b: Tensor) -> Tensor:
    a, b = _smaller(a, b)
    return torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)) / (a.shape[2] * a.shape[3])


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Any:
    """FSP as KD-Zoo and hankyul2 write it, a batched product."""
    return sum(
        F.mse_loss(_matrix(student[i], student[i + 1]), _matrix(teacher[i], teacher[i + 1]))
        for i in range(len(student) - 1)
    )


def _broadcast_matrix(a: Tensor, b: Tensor) -> Tensor:
    a, b = _smaller(a, b)
    return (a.unsqueeze(1).flatten(3) * b.unsqueeze(2).flatten(3)).mean(-1)


def fsp_broadcast(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Any:
    """FSP as RepDistiller writes it: every product of two channels is a map in memory before it is summed."""
    return sum(
        (_broadcast_matrix(student[i], student[i + 1]) - _broadcast_matrix(teacher[i], teacher[i + 1]))
        .pow(2)
        .mean()
        for i in range(len(student) - 1)
    )


FORMULAS: dict[str, Loss] = {"attention": attention, "fsp": fsp}


def call(
    loss: Callable[..., Any], case: Case, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> Callable[[], Any]:
    """One pass of the case's direction."""
    if case.direction == FORWARD:
        detached = [x.detach() for x in students]
        return lambda: loss(detached, teachers)
    if case.upstream == 1:
        return both_passes(lambda: loss(students, teachers), students)
    return both_passes(lambda: loss(students, teachers) * case.upstream, students)
