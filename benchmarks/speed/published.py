"""The losses of other methods as their authors' and toolkits' code computes them, in plain PyTorch.

Each takes the student's and the teacher's tensors, as the function of fastkd beside it, and returns the same
scalar: the figures of a benchmark compare like with like. Only the arithmetic and the temporaries are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def crd(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    rows: Tensor,
    normalizers: Sequence[float],
    temperature: float = 0.07,
    eps: float = 1e-7,
) -> Tensor:
    """RepDistiller: the drawn rows of each bank are gathered, (N, K + 1, D), and multiplied as a batch."""
    size, count = len(teacher_bank), rows.shape[1] - 1
    noise, total = count / size, student.new_zeros(())
    pairs = ((student, teacher_bank, normalizers[0]), (teacher, student_bank, normalizers[1]))
    for x, bank, normalizer in pairs:
        drawn = bank.index_select(0, rows.flatten()).view(*rows.shape, -1)
        odds = torch.exp(torch.bmm(drawn, x[:, :, None]) / temperature) / normalizer
        positive, negative = odds[:, 0], odds[:, 1:]
        found = (positive / (positive + noise + eps)).log().sum()
        found = found + (torch.full_like(negative, noise) / (negative + noise + eps)).log().sum()
        total = total - found / len(x)
    return total


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """mdistiller: two masks, masked sums of probabilities, and two softmaxes of each network."""
    total, temperature = student.new_zeros(()), 4.0
    mine = torch.zeros_like(student).scatter_(1, labels[:, None], 1).bool()
    rest = torch.ones_like(student).scatter_(1, labels[:, None], 0).bool()
    pairs = []
    for x in (student, teacher):
        p = F.softmax(x / temperature, dim=1)
        pairs.append(torch.cat([(p * mine).sum(1, keepdim=True), (p * rest).sum(1, keepdim=True)], 1))
    total = total + F.kl_div(pairs[0].log(), pairs[1], reduction="sum")
    others = F.log_softmax(student / temperature - 1000.0 * mine, dim=1)
    wanted = F.softmax(teacher / temperature - 1000.0 * mine, dim=1)
    return (total + 8 * F.kl_div(others, wanted, reduction="sum")) * (temperature**2 / len(labels))


def _distances(x: Tensor) -> Tensor:
    squares = x.pow(2).sum(1)
    found = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    found = found * (1 - torch.eye(len(x), dtype=x.dtype))
    return found / found[found > 0].mean()


def _cosines(x: Tensor) -> Tensor:
    apart = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(apart, apart.transpose(1, 2)).flatten()


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """RepDistiller and RKD's authors: distances by inner products, every difference in memory, (N, N, D)."""
    with torch.no_grad():
        distances, cosines = _distances(teacher), _cosines(teacher)
    return 25 * F.smooth_l1_loss(_distances(student), distances) + 50 * F.smooth_l1_loss(
        _cosines(student), cosines
    )


def hcl(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """ReviewKD: each coarser grid by its own adaptive pooling of the features."""
    total = students[0].new_zeros(())
    for s, t in zip(students, teachers):
        loss, weights, weight = F.mse_loss(s, t), 1.0, 1.0
        for side in (4, 2, 1):
            if side < s.shape[2]:
                weight /= 2
                grid = F.adaptive_avg_pool2d(s, (side, side)), F.adaptive_avg_pool2d(t, (side, side))
                loss, weights = loss + weight * F.mse_loss(*grid), weights + weight
        total = total + loss / weights
    return total


def ofd(students: Sequence[Tensor], teachers: Sequence[Tensor], margins: Sequence[Tensor]) -> Tensor:
    """OFD: the teacher's map raised to its margin, every difference squared, and a mask over the squares."""
    total = students[0].new_zeros(())
    for i, (s, t, margin) in enumerate(zip(students, teachers, margins)):
        t = torch.max(t, margin[None, :, None, None])
        squares = F.mse_loss(s, t, reduction="none")
        squares = squares * ((s > t) | (t > 0)).float()
        total = total + squares.sum() / len(s) / 2 ** (len(students) - 1 - i)
    return 1e-3 * total


def _sakd_map(x: Tensor) -> Tensor:
    g = x.pow(2).mean(1)
    products = torch.bmm(g, g.transpose(1, 2))
    return g + (products.softmax(1) * g + products.softmax(2) * g) / math.sqrt(x.shape[2])


def sakd(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """SAKD: the mean of squares, then rows of the map as tokens."""
    total = students[0].new_zeros(())
    for i, (s, t) in enumerate(zip(students, teachers)):
        s, t = (F.normalize(_sakd_map(x).flatten(1)) for x in (s, t))
        total = total + (s - t).pow(2).mean() / 2 ** (len(students) - 1 - i)
    return 200 * total


def norm(student: Tensor, teacher: Tensor, copies: int = 8) -> Tensor:
    """NORM: the teacher's map repeated in memory."""
    return copies * F.mse_loss(student, teacher.repeat(1, copies, 1, 1))


def _mean_squares(maps: Sequence[Tensor]) -> list[Tensor]:
    return [x.pow(2).mean(1, keepdim=True) for x in maps]


def _afd_shares(attention: Any, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    queries, keys = (
        torch.stack([layer(x.mean((2, 3))) for layer, x in zip(layers, side)], 1)
        for layers, side in ((attention.queries, teachers), (attention.keys, students))
    )
    pairs = attention.bilinear(keys.flatten(0, 1)).view(*keys.shape[:2], len(teachers), -1)
    scores = torch.einsum("nstd,ntd->nts", pairs, queries) + attention.p_t @ attention.p_s.T
    return (scores / queries.shape[2] ** 0.5).softmax(2)


def afd(attention: nn.Module, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """AFD: for each of the teacher's maps every student's map brought to its size, and all differences.

    ``attention``: fastkd's module, whose layers are the authors' and run one by one; its weights are (N, T,
    S).
    """
    shares = _afd_shares(attention, students, teachers)
    means = _mean_squares(students)
    total = shares.new_zeros(())
    for i, t in enumerate(_mean_squares(teachers)):
        target = F.normalize(t.flatten(1))
        resized = [F.adaptive_avg_pool2d(s, (t.shape[2], t.shape[3])).flatten(1) for s in means]
        mine = F.normalize(torch.stack(resized, 1), dim=2)
        apart = (mine - target[:, None]).pow(2).mean(2)
        total = total + (shares[:, i] * apart).sum(1).mean()
    return 200 * total


def review(levels: Sequence[Any], maps: Sequence[Tensor], sizes: Sequence[torch.Size]) -> list[Tensor]:
    """ReviewKD's levels, which have fastkd's layers: each joins its map with the deeper level's, resized, and
    makes two attention maps of both.
    """
    found: list[Tensor] = []
    deeper: Tensor | None = None
    for level, x, size in reversed(list(zip(levels, maps, sizes))):
        x = level.conv1(x)
        if level.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            z = level.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * z[:, 0].view(len(x), 1, *x.shape[2:]) + deeper * z[:, 1].view(len(x), 1, *x.shape[2:])
        deeper = F.interpolate(x, size, mode="nearest") if x.shape[2:] != size else x
        found.insert(0, level.conv2(deeper))
    return found


def calibration(connected: Sequence[Sequence[Tensor]], teachers: Sequence[Tensor], shares: Tensor) -> Tensor:
    """SemCKD: the squares of every pair's differences, meaned per image, times its share."""
    total = shares.new_zeros(())
    for i, row in enumerate(connected):
        for j, s in enumerate(row):
            t = teachers[j]
            if s.shape[2] < t.shape[2]:
                t = F.adaptive_avg_pool2d(t, (s.shape[2], s.shape[3]))
            apart = F.mse_loss(s, t, reduction="none").reshape(len(s), -1).mean(1)
            total = total + (apart * shares[:, i, j]).sum()
    return 400 * total / (len(shares) * len(connected))
