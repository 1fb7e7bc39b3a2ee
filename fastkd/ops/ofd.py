"""The partial distance of OFD: loss and gradients in one pass over both features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, reference
from fastkd.checks import Features
from fastkd.ops._differences import difference, difference_loss, fused, served
from fastkd.reference.common import stage_factors

difference_loss("ofd_loss", "Tensor[] margins, float[] factors")


def ofd_loss(
    student: Features,
    teacher: Features,
    margins: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 1e-3,
    channel_dim: int = 1,
) -> Tensor:
    """Squared difference of maps before the ReLU, where the teacher's is raised to a margin.

    Args:
        student, teacher: (N, C, *S) floating point with one to three spatial dimensions, or several, one a
            stage; pairs of one shape.
        margins: (C,), or one for each stage; :func:`fastkd.ofd_margin` gives them. None may be above 0, which
            is checked on a CPU alone.
        weights: one factor a stage; None: 1 for the last stage, 1/2 for the one before it, and so on.
        weight: multiplies the result.
        channel_dim: where C stands: 1, or -1 for views (N, *S, C) and tokens (N, L, C), without a copy.

    Returns: a scalar; float32, float64 if any input is float64. With ``target = max(t, margin)`` each stage
    is ``((s - target) ** 2)[(s > target) | (target > 0)].sum() / N``. On a CPU, dense pairs of one dtype but
    float64 are read once, for the loss and the gradients.
    Raises: TypeError, ValueError for what is not such a pair. A second derivative of what was read once
    raises RuntimeError; ``fastkd.reference`` has one.
    Source: Heo et al., *A comprehensive overhaul of feature distillation*, ICCV 2019, and its code.
    """
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers, bounds = checks.ofd_loss(student, teacher, margins, weights, weight)
    pairs = [*zip(students, teachers, bounds, strict=True)]
    if not fused(students[0]) or not all(served(s, t) and _is_constant(m) for s, t, m in pairs):
        return reference.ofd_loss(students, teachers, bounds, weights=weights, weight=weight)
    if students[0].dim() == 3:
        checks.tokens("ofd_loss", students, teachers)
    used = stage_factors(len(students)) if weights is None else weights
    factors = [float(weight) * float(w) / s.shape[0] for w, s in zip(used, students, strict=True)]
    numbers = [m.to(torch.float32).contiguous() for m in bounds]
    return difference("ofd_loss", students, teachers, numbers, factors)


def _is_constant(margin: Tensor) -> bool:
    return margin.dtype != torch.float64 and not margin.requires_grad
