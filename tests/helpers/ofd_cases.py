"""OFD's loss and margins in other forms than the package's."""

from __future__ import annotations

from statistics import NormalDist

import torch


def by_hand(students, teachers, margins, weights):
    """Three masks in place of one, as another implementation writes it."""
    total = 0
    for s, t, margin, weight in zip(students, teachers, margins, weights, strict=True):
        m = margin.view(-1, *[1] * (t.dim() - 2)).expand_as(t)
        square = torch.zeros_like(t)
        square = square + (s - t) ** 2 * (t > 0)
        square = square + (s - t) ** 2 * ((t <= 0) & (t > m) & (s > t))
        square = square + (s - m) ** 2 * ((t <= m) & (s > m))
        total = total + weight * square.sum() / len(s)
    return total


def margin_by_hand(weight, bias):
    if weight == 0:
        return min(bias, 0.0)
    found = NormalDist(bias, abs(weight))
    return -3 * abs(weight) if found.cdf(0) <= 0.001 else bias - weight**2 * found.pdf(0) / found.cdf(0)
