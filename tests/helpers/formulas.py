"""Every formula once more, written by hand: first from the definitions, then as each published implementation
computes it.

Nothing here calls fastkd. Loops and einsum stand where the package uses PyTorch's fused functions, so that a
shared mistake is unlikely.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# from the definitions


def pool(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Adaptive pooling of the trailing dimensions, window by window: window i of n spans floor(i*in/n) to
    ceil((i+1)*in/n).
    """
    lead = x.dim() - len(size)
    out = x.new_zeros(*x.shape[:lead], *size)
    for index in itertools.product(*map(range, size)):
        window = x[
            (
                ...,
                *(
                    slice(i * full // n, -(-(i + 1) * full // n))
                    for i, n, full in zip(index, size, x.shape[lead:])
                ),
            )
        ]
        flat = window.flatten(lead)
        out[(..., *index)] = flat.sum(-1) / flat.shape[-1] if mode == "avg" else flat.sort(-1).values[..., -1]
    return out


def smaller(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [min(pair) for pair in zip(a, b)]


def channel_power_sum(x: Tensor, p: float, channel_reduce: str, signed: bool) -> Tensor:
    q = torch.zeros_like(x[:, 0])
    for c in range(x.shape[1]):
        q = q + (x[:, c] if signed else x[:, c].abs()) ** p
    return q / x.shape[1] if channel_reduce == "mean" else q


def normalized(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    rows = []
    for sample in q:
        norm = math.sqrt(sum(v * v for v in sample.flatten().tolist()))
        rows.append(sample / (max(norm, eps) if eps_mode == "clamp" else norm + eps))
    return torch.stack(rows)


def attention_map(x, p=2.0, channel_reduce="mean", signed=False, normalize=True, eps=1e-12, eps_mode="clamp"):
    q = channel_power_sum(x, p, channel_reduce, signed)
    return normalized(q, eps, eps_mode) if normalize else q


def total(terms: Sequence[float], reduce: str, weights: Sequence[float] | None, weight: float) -> float:
    weighted = [t * w for t, w in zip(terms, weights or [1.0] * len(terms), strict=True)]
    return weight * sum(weighted) / (len(weighted) if reduce == "mean" else 1)


def attention_transfer_loss(
    student,
    teacher,
    p=2.0,
    channel_reduce="mean",
    signed=False,
    eps=1e-12,
    eps_mode="clamp",
    pool_when="before",
    pool_mode="avg",
    difference="squared",
    stage_reduce="sum",
    weights=None,
    weight=1.0,
    teacher_is_map=False,
) -> float:
    terms = []
    for s, t in zip(student, teacher, strict=True):
        t_space = t.shape[1:] if teacher_is_map else t.shape[2:]
        size = smaller(s.shape[2:], t_space)
        maps = []
        for x in (s,) if teacher_is_map else (s, t):
            if pool_when == "before":
                x = pool(x, size, pool_mode)
            q = channel_power_sum(x, p, channel_reduce, signed)
            maps.append(normalized(pool(q, size, pool_mode), eps, eps_mode))
        d = maps[0] - (t if teacher_is_map else maps[1])
        squares = [sum(v * v for v in sample.flatten().tolist()) for sample in d]
        n = len(squares)
        terms.append(
            sum(squares) / d.numel() if difference == "squared" else sum(map(math.sqrt, squares)) / n
        )
    return total(terms, stage_reduce, weights, weight)


def fsp_matrix(a: Tensor, b: Tensor, pool_mode: str = "avg") -> Tensor:
    size = smaller(a.shape[2:], b.shape[2:])
    a, b = (pool(x, size, pool_mode).flatten(2) for x in (a, b))
    return torch.einsum("nis,njs->nij", a, b) / math.prod(size)


def fsp_loss(
    student, teacher, pool_mode="avg", distance="squared", pair_reduce="sum", weights=None, weight=1.0
) -> float:
    terms = []
    for i in range(len(student) - 1):
        d = fsp_matrix(student[i], student[i + 1], pool_mode) - fsp_matrix(
            teacher[i], teacher[i + 1], pool_mode
        )
        squares = (d * d).sum(1)  # (N, Cb): squared norms of the columns
        n = len(d)
        terms.append(
            {
                "squared": squares.sum() / d.numel(),
                "frobenius": squares.sum() / n,
                "column_l2": squares.sqrt().sum() / n,
            }[distance].item()
        )
    return total(terms, pair_reduce, weights, weight)


def kd_loss(s: Tensor, t: Tensor, temperature: float, reduction: str, weight: float = 1.0) -> Tensor:
    rows = []
    for a, b in zip((s / temperature).exp(), (t / temperature).exp()):
        a, b = a / a.sum(), b / b.sum()
        rows.append(b * (b / a).log())
    each = temperature**2 * weight * torch.stack(rows)
    return {"none": each, "sum": each.sum(), "mean": each.mean(), "batchmean": each.sum() / len(each)}[
        reduction
    ]


# as published


def zagoruyko_at(s: Tensor, t: Tensor, p: int = 2) -> Tensor:
    """szagoruyko/attention-transfer, RepDistiller, mdistiller, hankyul2; maps of equal size."""
    s, t = (F.normalize(x.pow(p).mean(1).view(x.shape[0], -1)) for x in (s.contiguous(), t.contiguous()))
    return (s - t).pow(2).mean()


def repdistiller_at(s: Tensor, t: Tensor, p: int = 2) -> Tensor:
    """RepDistiller and mdistiller pool the larger feature map before the power."""
    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, (t.shape[2], t.shape[2]))
    elif s.shape[2] < t.shape[2]:
        t = F.adaptive_avg_pool2d(t, (s.shape[2], s.shape[2]))
    return zagoruyko_at(s, t, p)


def kdzoo_at(s: Tensor, t: Tensor, p: float = 2) -> Tensor:
    maps = []
    for x in (s, t):
        am = torch.pow(torch.abs(x), p).sum(dim=1, keepdim=True)
        maps.append(am / (torch.norm(am, dim=(2, 3), keepdim=True) + 1e-6))
    return F.mse_loss(*maps)


def paper_at(s: Tensor, t: Tensor) -> Tensor:
    """Eq. 2 of the paper (torchdistill's mode "paper", without the half): the norm of the difference, not
    squared, mean over the batch.
    """
    s, t = (F.normalize(x.pow(2).sum(1).flatten(1)) for x in (s, t))
    return torch.norm(s - t, dim=1).sum() / s.shape[0]


def same_size(a: Tensor, b: Tensor, mode: str = "avg") -> tuple[Tensor, Tensor]:
    shrink = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    if a.shape[2] > b.shape[2]:
        a = shrink(a, b.shape[2:])
    elif a.shape[2] < b.shape[2]:
        b = shrink(b, a.shape[2:])
    return a, b


def repdistiller_fsp(features: Sequence[Tensor]) -> list[Tensor]:
    """The broadcast form: (N, Cb, Ca), the transpose of ours."""
    out = []
    for a, b in zip(features[:-1], features[1:]):
        a, b = same_size(a, b)
        a, b = a.unsqueeze(1), b.unsqueeze(2)
        a, b = a.reshape(*a.shape[:3], -1), b.reshape(*b.shape[:3], -1)
        out.append((a * b).mean(-1))
    return out


def bmm_fsp(features: Sequence[Tensor], mode: str = "avg") -> list[Tensor]:
    """KD-Zoo, hankyul2 (mode avg), torchdistill (mode max)."""
    out = []
    for a, b in zip(features[:-1], features[1:]):
        a, b = same_size(a, b, mode)
        h, w = a.shape[2:]
        out.append(torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)) / (h * w))
    return out


def column_norms(s: Sequence[Tensor], t: Sequence[Tensor]) -> Tensor:
    """torchdistill: for each pair the column norms of the difference, summed, over the batch size."""
    return sum((x - y).norm(dim=1).sum() / x.shape[0] for x, y in zip(bmm_fsp(s, "max"), bmm_fsp(t, "max")))


def mdistiller_dkd(s: Tensor, t: Tensor, labels: Tensor, alpha: float, beta: float, T: float) -> Tensor:
    """mdistiller: masked sums of probabilities, then softmaxes with 1000 taken from the label's logit."""
    mask = F.one_hot(labels, s.shape[1])
    pairs = []
    for x in (s, t):
        p = F.softmax(x / T, 1)
        pairs.append(torch.cat([(p * mask).sum(1, True), (p * (1 - mask)).sum(1, True)], 1))
    first = F.kl_div(pairs[0].log(), pairs[1], reduction="sum")
    second = F.kl_div(
        F.log_softmax(s / T - 1000 * mask, 1), F.softmax(t / T - 1000 * mask, 1), reduction="sum"
    )
    return (alpha * first + beta * second) * T**2 / len(s)


def hinton(s: Tensor, t: Tensor, temperature: float = 4.0) -> Tensor:
    return (
        F.kl_div(F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1), reduction="sum")
        * temperature**2
        / s.shape[0]
    )
