"""Losses of logits and of embeddings: KD, RKD, CRD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks, graphs
from fastkd.reference.common import no_autocast, widen


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    reduction: str = "batchmean",
    weight: float = 1.0,
) -> Tensor:
    """Softened Kullback-Leibler divergence, ``T^2 KL(softmax(t / T) || softmax(s / T))``.

    Args:
        student_logits, teacher_logits: (N, K) floating point, of any dtypes, K >= 2. A class of logit -inf in
            the teacher adds nothing; one of logit -inf in the student alone makes the loss +inf.
        temperature: T, above 0.
        reduction: "batchmean" (sum over classes, mean over N), "mean" (over N and K), "sum" or "none".
        weight: multiplies the result.

    Returns: a scalar, or (N, K) for "none"; float32, float64 if any input is float64.
    Equals ``T * T * F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction=reduction)`` in float32.
    Raises: TypeError, ValueError for what is not such a pair of logits.
    Source: Hinton, Vinyals, Dean, *Distilling the knowledge in a neural network*, 2015.
    """
    checks.kd_loss(student_logits, teacher_logits, temperature, reduction, weight)
    temperature, weight = float(temperature), float(weight)
    with no_autocast(student_logits):
        s, t = graphs.save_constants(
            *(F.log_softmax(x / temperature, 1) for x in widen(student_logits, teacher_logits))
        )
        # A class that the teacher excludes (a logit of -inf) has no part in the sum, whatever the student's
        # logit. In the others a probability that underflows stays above zero, so that a student's -inf makes
        # the loss infinite, not NaN. The teacher's logarithms, not its probabilities, so that a vanishing one
        # has a gradient.
        excluded = t == -math.inf
        p = t.exp().clamp_min(torch.finfo(t.dtype).tiny)
        kl = p * (t.masked_fill(excluded, 0) - s.masked_fill(excluded, 0))
        if reduction != "none":
            kl = kl.mean() if reduction == "mean" else kl.sum()
        return kl * (weight * temperature**2 / (s.shape[0] if reduction == "batchmean" else 1))


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    weight: float = 1.0,
) -> Tensor:
    """Reference of :func:`fastkd.rkd_loss`, which see: (N, N, D) differences and (N, N, N) cosines."""
    checks.rkd_loss(student, teacher, distance_weight, angle_weight, weight)
    with no_autocast(student):
        sides = [x.flatten(1) for x in widen(student, teacher)]
        away = [x[None] - x[:, None] for x in sides]  # [i, j] is e_j - e_i
        squares = [x.square().sum(2) for x in away]
        zero = [square == 0 for square in squares]
        lengths = [
            square.masked_fill(mask, 1).sqrt().masked_fill(mask, 0)
            for square, mask in zip(squares, zero, strict=True)
        ]
        loss = sides[0].new_zeros(())
        if distance_weight:
            means = [x.sum() / (~mask).sum().clamp_min(1) for x, mask in zip(lengths, zero, strict=True)]
            scaled = [x / torch.where(mean > 0, mean, 1) for x, mean in zip(lengths, means, strict=True)]
            loss = loss + weight * distance_weight * F.smooth_l1_loss(scaled[0], scaled[1])
        if angle_weight:
            units = [
                x / y.masked_fill(mask, 1)[..., None] for x, y, mask in zip(away, lengths, zero, strict=True)
            ]
            loss = loss + weight * angle_weight * F.smooth_l1_loss(
                units[0] @ units[0].mT, units[1] @ units[1].mT
            )
        return loss


def crd_inputs(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    normalizers: Tensor | Sequence[float] | None,
) -> list[Tensor]:
    """The five tensors of :func:`fastkd.crd_loss` in one dtype; banks and normalizers as constants."""
    if normalizers is None:
        normalizers = (0.0, 0.0)
    if not isinstance(normalizers, Tensor):
        normalizers = torch.tensor(
            [float(value) for value in normalizers], dtype=torch.float32, device=student.device
        )
    return widen(student, teacher, student_bank.detach(), teacher_bank.detach(), normalizers.detach())


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    rows: Tensor,
    *,
    temperature: float = 0.07,
    normalizers: Tensor | Sequence[float] | None = None,
    eps: float = 1e-7,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`fastkd.crd_loss`, which see, with the (N, K + 1, D) drawn rows of each bank."""
    checks.crd_loss(student, teacher, student_bank, teacher_bank, rows, temperature, normalizers, eps, weight)
    checks.crd_rows(rows, len(student_bank))
    temperature, eps = float(temperature), float(eps)
    with no_autocast(student):
        s, t, s_bank, t_bank, given = crd_inputs(student, teacher, student_bank, teacher_bank, normalizers)
        size, noise = len(s_bank), (rows.shape[1] - 1) / len(s_bank)
        loss, found = s.new_zeros(()), []
        for x, bank, z in ((s, t_bank, given[0]), (t, s_bank, given[1])):
            scores = (bank[rows] * x[:, None]).sum(2) / temperature
            z = torch.where(z > 0, z, scores.detach().exp().mean() * size)
            # log P; the others as log1p, since in float32 P + K / M would be rounded
            positive = scores[:, 0] - z.log()
            loss = loss + F.softplus(math.log(noise + eps) - positive, threshold=1000).sum()
            loss = loss + ((scores[:, 1:].exp() / z + eps) / noise).log1p().sum()
            found.append(z)
        return loss * (float(weight) / len(s)), torch.stack(found)
