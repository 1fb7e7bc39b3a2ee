"""RKD where Triton does not serve it: some vertices at a time in plain PyTorch, or inner products of all
pairs and the C++ library's kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.ops._gradients import where_needed
from fastkd.reference.common import no_autocast

NEAR = 2.0**-13
"""Below this share of the largest sample two samples are near: a cosine of inner products in float64 would be
off by more than float32's rounding.
"""
NUMBERS = 2**16
"""How many differences and cosines a chunk holds. One vertex makes (B, B) and (B, D) of them; in a small
batch several vertices are taken at once.
"""


def by_vertices(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient for s, for t) in plain PyTorch, by differences from some vertices at a time; a
    gradient that nobody needs has no elements.
    """
    with no_autocast(s):
        grads = where_needed(torch.zeros_like, (s, t), (need_s, need_t))
        loss = s.new_zeros(())
        pulls: list[Tensor | None] = [None, None]
        if distance:
            loss, pulls = _distances([_lengths(x, _chunks(s, t)) for x in (s, t)], distance, (need_s, need_t))
        if angle or need_s or need_t:
            for rows in _chunks(s, t):
                loss = loss + _vertices(rows, (s, t), angle, pulls, (need_s, need_t), grads)
    return loss, grads[0], grads[1]


def by_products(
    s: Tensor, t: Tensor, distance: float, angle: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same by the library's kernels, in float64 but for the samples: with the inner products of all pairs
    a triple costs some twenty operations, whatever D is. None where samples are too near for that.

    A gradient is a matrix over the pairs times the samples. Its rows add up to 0, since what moves all
    samples alike changes nothing.
    """
    with no_autocast(s):
        return _products(s, t, distance, angle, needs)


def _products(
    s: Tensor, t: Tensor, distance: float, angle: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    lengths = [torch.ops.fastkd.rkd_lengths.default(x.contiguous()) for x in (s, t)]
    sides = [x.double() for x in (s, t)]
    sides = [x - x.mean(0) for x in sides]  # not in float32, whose rounding turns differences of near samples
    if angle and any(_near(x, y) for x, y in zip(sides, lengths, strict=True)):
        return None
    loss = sides[0].new_zeros(())
    pulls: list[Tensor | None] = [None, None]
    if distance:
        loss, pulls = _distances(lengths, distance, needs)
    sums: list[Tensor | None] = [None, None]
    if angle:
        inverses = [x.reciprocal_().masked_fill_(x.isinf(), 0) for x in lengths]  # in their memory
        products = [x @ x.T for x in sides]
        factor = angle / len(s) ** 3
        found = torch.ops.fastkd.rkd_angles.default(
            products[0], inverses[0], products[1], inverses[1], *needs
        )
        loss = loss + factor * found[0]
        del products
        for i, need in enumerate(needs):
            if need:
                weights, parts, turns = found[i + 1].mul_(2 * factor)
                turns *= inverses[i].square_()
                sums[i] = weights.sub_(parts).sub_(parts.T).add_(turns).add_(turns.T)
        del found, inverses
    grads = where_needed(torch.zeros_like, (s, t), needs)
    for grad, side, matrix, pull in zip(grads, sides, sums, pulls, strict=True):
        if matrix is None and pull is None:
            continue
        if matrix is None:
            matrix = side.new_zeros((len(s), len(s)))
        if pull is not None:  # each pair is met twice, from either sample
            matrix = matrix.sub_(pull, alpha=2)
        matrix.fill_diagonal_(0)
        matrix.diagonal().copy_(-matrix.sum(1))
        grad.copy_(matrix @ side)
    return loss.to(s.dtype), grads[0], grads[1]


def _near(x: Tensor, lengths: Tensor) -> bool:
    """Whether two samples that are not equal are near, for their size."""
    shortest = lengths.masked_fill(lengths == 0, torch.inf).min()
    return bool(shortest < NEAR * torch.linalg.vector_norm(x, dim=1).max())


def _chunks(s: Tensor, t: Tensor) -> list[slice]:
    count = s.shape[0]
    step = max(1, NUMBERS // (count * (count + max(s.shape[1], t.shape[1]))))
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


def _lengths(x: Tensor, chunks: list[slice]) -> Tensor:
    """(N, N), by differences."""
    return torch.cat([torch.linalg.vector_norm(x - x[rows, None], dim=2) for rows in chunks])


def _distances(
    sides: list[Tensor], factor: float, needs: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """(the loss of the distances, dloss/d(distance) / distance of each side that needs it)."""
    found = []
    for lengths in sides:
        positive = (lengths > 0).sum().clamp_min(1)
        mean = lengths.sum() / positive
        found.append((lengths, positive, torch.where(mean > 0, mean, 1)))
    scaled = [lengths / mean for lengths, _, mean in found]
    factor /= scaled[0].numel()
    loss = factor * F.smooth_l1_loss(scaled[0], scaled[1], reduction="sum")
    slope = factor * (scaled[0] - scaled[1]).clamp_(-1, 1)
    pulls: list[Tensor | None] = []
    for (lengths, positive, mean), sign, need in zip(found, (1, -1), needs, strict=True):
        if not need:
            pulls.append(None)
            continue
        through_mean = (slope * lengths).sum() / (mean.square() * positive)
        pulls.append(torch.where(lengths > 0, sign * (slope / mean - through_mean) / lengths, 0))
    return loss, pulls


def _vertices(
    rows: slice,
    sides: tuple[Tensor, Tensor],
    angle: float,
    pulls: list[Tensor | None],
    needs: tuple[bool, bool],
    grads: list[Tensor],
) -> Tensor:
    """The angles at the samples ``rows``; adds to ``grads`` theirs and that of the distances from them."""
    away = [x - x[rows, None] for x in sides]  # (rows, N, D): e_j - e_i
    lengths = [torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in away]
    inverse = [torch.where(length > 0, 1 / length, 0) for length in lengths]
    units = [x * y for x, y in zip(away, inverse, strict=True)]
    loss, slope = sides[0].new_zeros(()), None
    if angle:
        cosines = [x @ x.mT for x in units]
        factor = angle / sides[0].shape[0] ** 3
        loss = factor * F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")
        slope = factor * (cosines[0] - cosines[1]).clamp_(-1, 1)  # symmetric in j and k
    for i, (sign, need) in enumerate(zip((1, -1), needs, strict=True)):
        if not need:
            continue
        pull = pulls[i]
        if slope is not None:
            change = 2 * sign * (slope @ units[i])
            change = (change - units[i] * (units[i] * change).sum(2, keepdim=True)) * inverse[i]
            grads[i] += change.sum(0)
            grads[i][rows] -= change.sum(1)
        if pull is not None:  # each pair is met twice, from either sample
            grads[i][rows] -= 2 * (pull[rows, :, None] * away[i]).sum(1)
    return loss
