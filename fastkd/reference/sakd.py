"""Self-attention distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features
from fastkd.reference.common import combined, no_autocast, normalized_map, stage_factors, widen


def self_attended(g: Tensor) -> Tensor:
    """The map g (N, H, H) and what its self-attention adds; the tokens are its rows."""
    rows = torch.softmax(g @ g.mT, 2)  # that over the columns is its transpose, since g g^T is symmetric
    return g + (rows + rows.mT) * g / math.sqrt(g.shape[2])


def sakd_of_maps(squares: list[Tensor], weights: Sequence[float] | None, weight: float) -> Tensor:
    """The loss from the means of squares over channels, (N, H, H) each, the student's first."""
    count = len(squares) // 2
    maps = [normalized_map(self_attended(g), 1e-12, "clamp") for g in squares]
    pairs = [graphs.save_constants(s, t) for s, t in zip(maps[:count], maps[count:], strict=True)]
    weights = stage_factors(count) if weights is None else weights
    return combined([(s - t).square().mean() for s, t in pairs], weights, "sum", weight)


def sakd_map(x: Tensor, *, channel_dim: int = 1) -> Tensor:
    """See :func:`fastkd.sakd_map`."""
    x = checks.channels_second(x, channel_dim)
    checks.sakd_map(x)
    with no_autocast(x):
        return self_attended(widen(x)[0].square().mean(1))


def sakd_loss(
    student: Features,
    teacher: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 200.0,
    channel_dim: int = 1,
) -> Tensor:
    """See :func:`fastkd.sakd_loss`."""
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers = checks.sakd_loss(student, teacher, weights, weight)
    with no_autocast(students[0]):
        return sakd_of_maps([x.square().mean(1) for x in widen(*students, *teachers)], weights, weight)
