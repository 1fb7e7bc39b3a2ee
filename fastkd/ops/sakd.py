"""Self-attention distillation: on a CPU loss and gradients in one pass over each feature; else maps by the
attention kernels, the rest on (N, H, H) in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, reference
from fastkd.checks import Features
from fastkd.ops._differences import dense, difference, difference_loss, fused
from fastkd.ops.attention_map import attention_map
from fastkd.reference.common import accumulator, no_autocast, stage_factors

difference_loss("sakd_loss", "float[] factors")


def sakd_map(x: Tensor, *, channel_dim: int = 1) -> Tensor:
    """The mean of squares over channels with its self-attention, whose tokens are the map's rows.

    Args:
        x: (N, C, H, H) floating point; only square maps, since the products are elementwise.
        channel_dim: where C stands: 1, or -1 for views (N, H, H, C), without a copy.

    Returns: (N, H, H); float32, float64 for float64: with ``g = x.square().mean(1)`` and ``a = g @ g.mT``
    ``g + (a.softmax(1) * g + a.softmax(2) * g) / math.sqrt(H)``.
    Raises: TypeError, ValueError for anything else. A second derivative raises RuntimeError;
    ``fastkd.reference`` has one.
    Source: github.com/CRGuan/SAKD: products are elementwise, not of matrices, the softmax not scaled.
    """
    x = checks.channels_second(x, channel_dim)
    checks.sakd_map(x)
    with no_autocast(x):
        return reference.sakd.self_attended(attention_map(x, normalize=False))


def sakd_loss(
    student: Features,
    teacher: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 200.0,
    channel_dim: int = 1,
) -> Tensor:
    """The mean squared difference of the l2-normalized :func:`sakd_map` of student and teacher, summed over
    the stages.

    Args:
        student, teacher: a tensor each, or a sequence of n, one a stage: (N, C, H, H) floating point, N and H
            the same in both.
        weights: one factor a stage; None: 1/2^(n-1-i) for stage i from 0, so 1/4, 1/2, 1 for three.
        weight: multiplies the result.
        channel_dim: as in :func:`sakd_map`.

    Returns: a scalar; float32, float64 if any input is float64. With y the maps divided by max(norm, 1e-12),
    sample by sample, ``weight * sum(w * (y_s - y_t).square().mean() for each stage)``. On a CPU, features
    that lie dense in memory are read once for the loss and the gradients, but in float64.
    Raises: TypeError, ValueError for what does not fit. A second derivative raises RuntimeError;
    ``fastkd.reference`` has one.
    Source: github.com/CRGuan/SAKD, with its connector first: ``fastkd.methods.sakd``.
    """
    student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    students, teachers = checks.sakd_loss(student, teacher, weights, weight)
    tensors = students + teachers
    if fused(students[0]) and all(dense(x) for x in tensors):
        factors = [
            float(weight) * float(w) / (x.shape[0] * x.shape[2] ** 2)
            for w, x in zip(weights or stage_factors(len(students)), students, strict=True)
        ]
        return difference("sakd_loss", students, teachers, factors)
    if accumulator(tensors) == torch.float64:
        tensors = [x.double() for x in tensors]
    with no_autocast(tensors[0]):
        return reference.sakd.sakd_of_maps(
            [attention_map(x, normalize=False) for x in tensors], weights, weight
        )
