"""What rounding makes of the gradients of FSP's distance "column_l2"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.reference.common import combined, pool_to, smaller


def column_gradient_terms(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    upstream: Tensor | None = None,
    *,
    pool_mode: str = "avg",
    pair_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    **switches: object,
) -> list[Tensor]:
    """For each number of the gradients, how many times u it may be off, where each number is rounded by u.

    The gradient by G_s is c y, y = d / |d| for each column d of G_s - G_t. Rounding the products of which d
    is the sum changes it by up to u e, e the sum of their absolute values, and |d| by up to u <|y|, e>. So y
    changes by up to u (e + |y| <|y|, e>) / |d|, however exact the rest: much where d is small beside what it
    is the difference of. Along d the two parts need not make up for each other. Where the matrix is made
    again in the backward pass its norm is that of the forward pass, with other roundings. Then c y^T a, a
    gradient by a feature, is rounded in each of its own products.
    """
    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in student[1:]]
    slopes = torch.autograd.grad(combined(zeros, weights, pair_reduce, weight), zeros)
    scale = 1.0 if upstream is None else upstream.double().abs()
    chains = [[x.double().contiguous().requires_grad_() for x in side] for side in (student, teacher)]
    found = [[torch.zeros_like(x) for x in side] for side in chains]
    for i, slope in enumerate(slopes):
        pairs = [side[i : i + 2] for side in chains]
        pooled = [[_pool(x, pair, pool_mode) for x in pair] for pair in pairs]
        m = slope.abs() * scale * _column_terms(pairs, pooled, pool_mode)
        for pair, maps, sums in zip(pairs, pooled, found):
            a, b = (x.detach().abs().flatten(2) for x in maps)
            for j, (x, map_, by) in enumerate(zip(pair, maps, (m @ b, m.transpose(1, 2) @ a))):
                by = (by / a.shape[2]).view_as(map_)
                # back through the averages, or to where the maxima were
                sums[i + j] += torch.autograd.grad(map_, x, by)[0] if map_ is not x else by
    return [*found[0], *found[1]]


def _pool(x: Tensor, pair: Sequence[Tensor], pool_mode: str) -> Tensor:
    return pool_to(x, smaller(*(y.shape[2:] for y in pair)), pool_mode)


def _gram(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(2), b.flatten(2)
    return a @ b.transpose(1, 2) / a.shape[2]


@torch.no_grad()
def _column_terms(
    pairs: Sequence[Sequence[Tensor]], pooled: Sequence[Sequence[Tensor]], pool_mode: str
) -> Tensor:
    """|y| and, in units of u, its change, of the mean over samples."""
    (s, s_next), (t, t_next) = pooled
    d = _gram(s, s_next) - _gram(t, t_next)
    e = torch.zeros_like(d)
    same = s.shape[2:] == t.shape[2:]
    if same:  # made of the features' differences
        e += _gram((s - t).abs(), s_next.abs()) + _gram(t.abs(), (s_next - t_next).abs())
    if not same or any(map_ is not x for pair, maps in zip(pairs, pooled) for x, map_ in zip(pair, maps)):
        # of both matrices; or of features that were rounded when they were pooled
        for pair in pairs:
            e += _gram(*(_pool(x.abs() if pool_mode == "avg" else x, pair, pool_mode).abs() for x in pair))
    norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    none = norm == 0  # a column of zeros has the gradient 0, not one that is nearly 0
    y = d.abs() / norm.masked_fill(none, 1)
    change = (e + y * (y * e).sum(1, keepdim=True)) / norm.masked_fill(none, 1)
    return (y + change).masked_fill(none, 0) / d.shape[0]
