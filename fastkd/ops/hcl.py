"""The hierarchical context loss of ReviewKD: loss and gradients in one pass over both features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, reference
from fastkd.checks import Features
from fastkd.ops._differences import difference, difference_loss, fused, served
from fastkd.reference.common import accumulator
from fastkd.reference.maps import hcl_factors

difference_loss("hcl_loss", "float[] factors")


def hcl_loss(
    student: Features,
    teacher: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    channel_dim: int = 1,
) -> Tensor:
    """The hierarchical context loss of ReviewKD: mean squared differences at full size and of averages over
    coarser grids.

    Args:
        student, teacher: a tensor (N, C, H, W) or several, one a level; the shapes of a pair are the same.
            Any floating dtype.
        weights: one factor a level, 1 by default.
        weight: multiplies the result.
        channel_dim: where C stands: 1, or -1 for views (N, H, W, C), without a copy.

    Returns: a scalar; float32, float64 if any input is float64. The levels are summed.
    Of one level: ``mean((s - t)^2)`` with factor 1, then the same of both averaged to 4x4, 2x2 and 1x1. A
    grid is used where its side is smaller than H; the first that is used has the factor 1/2, each next one
    half of that. The sum is divided by that of the factors. On a CPU, levels of one dtype but float64, which
    lie dense and alike in memory, are read once for the loss and the gradients.
    Raises: TypeError, ValueError for what are not such pairs. A second derivative of what was read once
    raises RuntimeError; ``fastkd.reference`` has one.
    Source: Chen, Liu, Zhao, Jia, *Distilling knowledge via knowledge review*, CVPR 2021.
    """
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers = checks.hcl_loss(student, teacher, weights, weight)
    used = [float(w) for w in (weights or [1.0] * len(students))]
    levels = [*zip(students, teachers, used, strict=True)]
    double = accumulator(students + teachers) == torch.float64
    here = [fused(s) and not double and served(s, t) for s, t, _ in levels]
    rest = [level for level, is_here in zip(levels, here, strict=True) if not is_here]
    total: Tensor | None = None
    if rest:
        s, t, w = zip(*rest, strict=True)
        total = reference.hcl_loss(s, t, weights=w, weight=weight)
    if any(here):
        s, t, w = zip(*(level for level, is_here in zip(levels, here, strict=True) if is_here), strict=True)
        factors = [
            float(weight) * factor / (sum(hcl_factors(x.shape[2])) * x.numel())
            for x, factor in zip(s, w, strict=True)
        ]
        loss = difference("hcl_loss", s, t, factors)
        total = loss if total is None else total + loss
    assert total is not None
    return total
