"""Losses that compare maps number by number, OFD, HCL and NORM; and batch norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features
from fastkd.reference.common import accumulator, combined, no_autocast, stage_factors, widen


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, relu: bool = False, eps: float = 1e-5
) -> Tensor:
    """The y of :func:`fastkd.ops.batch_norm.batch_norm`, by x's statistics; of x's dtype, rounded once."""
    with no_autocast(x):
        wide, w, b = widen(x, weight, bias)
        y = F.batch_norm(wide, None, None, w, b, training=True, eps=eps)
        if residual is not None:
            y = y + residual
        return (torch.relu(y) if relu else y).to(x.dtype)


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The margins of :func:`ofd_loss`: for each channel of a batch norm the mean of what it sends below 0.

    Args:
        weight, bias: (C,), of the batch norm before the ReLU: its numbers are normal, of deviation s =
            abs(weight) and mean bias.

    Returns: (C,), at most 0; float32, float64 if any input is float64. With the standard density phi and its
    integral Phi ``bias - s * phi(bias / s) / Phi(-bias / s)``; -3 s where Phi(-bias / s) is at most 0.001;
    the smaller of bias and 0 where s is 0.
    Raises: TypeError, ValueError for what is not such a pair.
    Source: Heo et al., *A comprehensive overhaul of feature distillation*, ICCV 2019.
    """
    checks.ofd_margin(weight, bias)
    deviation, mean = weight.double().abs(), bias.double()
    constant = deviation == 0
    deviation = deviation.masked_fill(constant, 1)
    z = mean / deviation
    below = 0.5 * torch.erfc(z / math.sqrt(2))
    rare = below <= 0.001
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    margin = torch.where(rare, -3 * deviation, mean - deviation * density / below.masked_fill(rare, 1))
    return torch.where(constant, mean, margin).clamp_max(0).to(accumulator((weight, bias)))


def ofd_loss(
    student: Features,
    teacher: Features,
    margins: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 1e-3,
    channel_dim: int = 1,
) -> Tensor:
    """See :func:`fastkd.ofd_loss`."""
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers, bounds = checks.ofd_loss(student, teacher, margins, weights, weight)
    count = len(students)
    if students[0].dim() == 3:
        checks.tokens("ofd_loss", students, teachers)
    with no_autocast(students[0]):
        wide, terms = widen(*students, *teachers, *bounds), []
        for s, t, margin in zip(wide[:count], wide[count : 2 * count], wide[2 * count :], strict=True):
            s, target = graphs.save_constants(s, torch.maximum(t, margin.view(-1, *[1] * (t.dim() - 2))))
            reached = (s <= target) & (target <= 0)  # in this form a NaN stays one
            terms.append((s - target).masked_fill(reached, 0).square().sum() / s.shape[0])
        return combined(terms, stage_factors(count) if weights is None else weights, "sum", weight)


def hcl_loss(
    student: Features,
    teacher: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    channel_dim: int = 1,
) -> Tensor:
    """See :func:`fastkd.hcl_loss`."""
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers = checks.hcl_loss(student, teacher, weights, weight)
    with no_autocast(students[0]):
        wide = widen(*students, *teachers)
        terms = [_hcl_level(s - t) for s, t in zip(wide[: len(students)], wide[len(students) :], strict=True)]
        return combined(terms, weights, "sum", weight)


def hcl_factors(height: int) -> list[float]:
    """Of the full size and of the grids that are used."""
    return [0.5**i for i in range(1 + sum(side < height for side in (4, 2, 1)))]


def _hcl_level(difference: Tensor) -> Tensor:
    """Averages are linear, so those of the difference are the difference of the averages."""
    total, factor, factors = difference.square().mean(), 1.0, 1.0
    x, whole = difference, all(size % 4 == 0 for size in difference.shape[2:])
    for side in (4, 2, 1):
        if side < difference.shape[2]:
            factor /= 2
            factors += factor
            x = _grid(x if whole else difference, side)  # averages of equal parts may be averaged further
            total = total + factor * x.square().mean()
    return total / factors


def _grid(x: Tensor, side: int) -> Tensor:
    """``x`` averaged to (side, side). Equal parts are averaged faster by avg_pool2d, to the same numbers."""
    if all(size % side == 0 for size in x.shape[2:]):
        return F.avg_pool2d(x, [size // side for size in x.shape[2:]])
    return F.adaptive_avg_pool2d(x, side)


def norm_loss(u: Tensor, target: Tensor, copies: int) -> Tensor:
    """See :func:`fastkd.ops.norm.norm_loss`."""
    if target.shape[2:] != u.shape[2:]:
        target = F.adaptive_max_pool2d(target, u.shape[2:])
    wide, narrow = widen(u, target)
    each = wide.unflatten(1, (copies, target.shape[1]))
    # not F.mse_loss, which multiplies a DTensor's gradient by the number of processes (PyTorch 2.14)
    return copies * (each - narrow[:, None]).square().mean()
