"""Losses of logits and of embeddings: KD, DKD, RKD, CRD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks, graphs
from fastkd.reference.common import no_autocast, widen

_EXCLUDED = -1e30
"""In place of a logit of -inf."""


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    reduction: str = "batchmean",
    weight: float = 1.0,
    activation: str = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """Softened Kullback-Leibler divergence, ``T^2 KL(softmax(t / T) || softmax(s / T))``.

    Args:
        student_logits, teacher_logits: (N, K) floating point, of any dtypes, K >= 2. A class of logit -inf in
            the teacher adds nothing; one of logit -inf in the student alone makes the loss +inf. With a mask
            (N, L, K) too, for tokens: the classes are last.
        temperature: T, above 0.
        reduction: "batchmean" (sum over classes, mean over N), "mean" (over N and K), "sum" or "none".
        weight: multiplies the result.
        activation: "softmax", or "sigmoid" for classes that exclude none of each other: the binary divergence
            of each class, ``p log(p / q) + (1 - p) log((1 - p) / (1 - q))`` with p = sigmoid(t / T) and
            q = sigmoid(s / T). "identity" is for regression: the squared difference of each output, whatever
            T. With these two K may be 1.
        mask: bool, (N,) for (N, K), (N, L) for (N, L, K). Where it is False neither sum nor mean counts the
            sample or token, whatever its logits; a mean over none is 0.

    Returns: a scalar, or the logits' shape for "none"; float32, float64 if any input is float64.
    Equals ``T * T * F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction=reduction)`` in float32.
    Raises: TypeError, ValueError for what is not such a pair of logits.
    Source: Hinton, Vinyals, Dean, *Distilling the knowledge in a neural network*, 2015.
    """
    checks.kd_loss(student_logits, teacher_logits, temperature, reduction, weight, activation, mask)
    temperature, weight = float(temperature), float(weight)
    with no_autocast(student_logits):
        factor, softened = weight, widen(student_logits, teacher_logits)
        if activation != "identity":
            factor, softened = weight * temperature**2, [x / temperature for x in softened]
        if mask is not None:  # equal answers, so that neither the sum nor a gradient sees what is masked
            softened = [x.masked_fill(~mask.unsqueeze(-1), 0) for x in softened]
        s, t = graphs.save_constants(*(_compared(x, activation) for x in softened))
        if activation == "identity":
            kl = (s - t).square()
        else:
            # A class that the teacher excludes (a logit of -inf) has no part in the sum, whatever the
            # student's logit. In the others a probability that underflows stays above zero, so that a
            # student's -inf makes the loss infinite, not NaN. The teacher's logarithms, not its
            # probabilities, so that a vanishing one has a gradient.
            excluded = t == -math.inf
            p = t.exp().clamp_min(torch.finfo(t.dtype).tiny)
            kl = p * (t.masked_fill(excluded, 0) - s.masked_fill(excluded, 0))
        if activation == "sigmoid":
            kl = kl.sum(-1)
        if reduction in ("none", "sum"):
            return (kl if reduction == "none" else kl.sum()) * factor
        if mask is None:
            return kl.mean() * factor if reduction == "mean" else kl.sum() * (factor / kl.shape[0])
        count = mask.sum().clamp_min(1) * (kl.shape[-1] if reduction == "mean" else 1)
        return kl.sum() / count * factor


def _compared(x: Tensor, activation: str) -> Tensor:
    """Outputs as they are, or logarithms of probabilities: of all classes (..., K), or of each class and its
    opposite (..., K, 2).
    """
    if activation == "identity":
        return x
    if activation == "softmax":
        return F.log_softmax(x, -1)
    return torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    weight: float = 1.0,
) -> Tensor:
    """Decoupled distillation: the softened divergence in two parts, each with its own factor.

    ``alpha`` belongs to the divergence between "the labelled class" and "another class", ``beta`` to that
    among the other classes alone. With ``alpha`` 1 and, for each sample, the teacher's probability of another
    class in place of ``beta``, the sum would be :func:`fastkd.kd_loss`.

    Args:
        student_logits, teacher_logits: (N, K) floating point, of any dtypes, K >= 3. A logit of -inf counts
            as -1e30 T: a class that the teacher excludes adds nothing.
        labels: (N,) int64, from 0 to K - 1.
        temperature: T, above 0; both parts are multiplied by its square.
        alpha, beta: factors of the two parts; one that is 0 is not computed.
        weight: multiplies the result.

    Returns: a scalar, the mean over N; float32, float64 if any input is float64. With F the functions of
    ``torch.nn.functional``, s and t the logits / T, p = softmax(s) of the label, q = softmax(t) of it, and
    s', t' the logits of the other classes, it equals ``T * T`` times the mean over N of
    ``alpha * (q * log(q / p) + (1 - q) * log((1 - q) / (1 - p)))
    + beta * F.kl_div(F.log_softmax(s', 1), F.softmax(t', 1), reduction="none").sum(1)``.
    Raises: TypeError, ValueError for what is not such a pair of logits with its labels.
    Source: Zhao, Cui, Song, Qiu, Liang, *Decoupled knowledge distillation*, 2022.
    """
    checks.dkd_loss(student_logits, teacher_logits, labels, temperature, alpha, beta, weight)
    temperature, place = float(temperature), labels.unsqueeze(1)
    with no_autocast(student_logits):
        # what is excluded, by a logit of -inf or here the label itself, gets a number so low that it has the
        # probability 0, and that 0 times its logarithm is 0
        sides = [(x / temperature).clamp_min(_EXCLUDED) for x in widen(student_logits, teacher_logits)]
        others = [x.scatter(1, place, _EXCLUDED) for x in sides]
        logs = [F.log_softmax(x, 1) for x in others]
        loss = sides[0].new_zeros(())
        if alpha:
            # log-odds of the label: its logit less log(sum(exp(the others))), which is any of those less its
            # logarithm; of the largest, that is exact
            odds = []
            for x, y, log in zip(sides, others, logs, strict=True):
                best = y.argmax(1, True)
                odds.append(x.gather(1, place) - y.gather(1, best) + log.gather(1, best))
            s, t = graphs.save_constants(*odds)
            p = t.sigmoid()  # cross-entropy, less the teacher's entropy
            first, least = (F.binary_cross_entropy_with_logits(x, p, reduction="sum") for x in (s, t))
            loss = loss + float(alpha) * (first - least)
        if beta:
            s, t = graphs.save_constants(*logs)
            loss = loss + float(beta) * torch.dot(t.exp().flatten(), (t - s).flatten())
        return loss * (float(weight) * temperature**2 / len(labels))


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
            loss = loss + weight * distance_weight * _smooth_l1(scaled[0], scaled[1])
        if angle_weight:
            units = [
                (x / y.masked_fill(mask, 1)[..., None]).masked_fill(mask[..., None], 0)
                for x, y, mask in zip(away, lengths, zero, strict=True)
            ]
            loss = loss + weight * angle_weight * _smooth_l1(units[0] @ units[0].mT, units[1] @ units[1].mT)
        return loss


def _smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    """The mean apart: in one, PyTorch 2.14 multiplies a DTensor's gradient by the number of processes."""
    return F.smooth_l1_loss(a, b, reduction="none").mean()


def crd_normalizers(given: Tensor | Sequence[float] | None, like: Tensor) -> Tensor:
    """As a tensor beside ``like``, without gradient; made on its device, since a copy to a GPU would wait."""
    if isinstance(given, Tensor):
        return given.detach()
    if given is None:
        return like.new_zeros(2, dtype=torch.float32)
    return torch.stack([like.new_full((), float(value), dtype=torch.float32) for value in given])


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
        constants = student_bank.detach(), teacher_bank.detach(), crd_normalizers(normalizers, student)
        s, t, s_bank, t_bank, given = widen(student, teacher, *constants)
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
