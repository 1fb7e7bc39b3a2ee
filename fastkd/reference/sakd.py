"""Self-attention distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features
from fastkd.reference.common import combined, no_autocast, normalized_map, widen


def self_attended(g: Tensor) -> Tensor:
    """The map g (N, H, H) and what its self-attention adds; the tokens are its rows."""
    rows = torch.softmax(g @ g.mT, 2)  # that over the columns is its transpose, since g g^T is symmetric
    return g + (rows + rows.mT) * g / math.sqrt(g.shape[2])


def sakd_of_maps(energies: list[Tensor], weights: Sequence[float] | None, weight: float) -> Tensor:
    """The loss from the energy maps, the student's first."""
    count = len(energies) // 2
    maps = [normalized_map(self_attended(g), 1e-12, "clamp") for g in energies]
    pairs = [graphs.save_constants(s, t) for s, t in zip(maps[:count], maps[count:], strict=True)]
    weights = [0.5 ** (count - 1 - i) for i in range(count)] if weights is None else weights
    return combined([(s - t).square().mean() for s, t in pairs], weights, "sum", weight)


def sakd_map(x: Tensor) -> Tensor:
    """See :func:`fastkd.sakd_map`."""
    checks.sakd_map(x)
    with no_autocast(x):
        return self_attended(widen(x)[0].square().mean(1))


def sakd_loss(
    student: Features, teacher: Features, *, weights: Sequence[float] | None = None, weight: float = 200.0
) -> Tensor:
    """See :func:`fastkd.sakd_loss`."""
    students, teachers = checks.sakd_loss(student, teacher, weights, weight)
    with no_autocast(students[0]):
        return sakd_of_maps([x.square().mean(1) for x in widen(*students, *teachers)], weights, weight)
