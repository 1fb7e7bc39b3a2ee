"""Relational knowledge distillation: distances and angles between samples, in O(B^2) memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import CPP, TRITON, Backend
from fastkd._private import transforming
from fastkd.ops._cuda_limits import no_kernel
from fastkd.ops._gradients import handed_out, save, scaled
from fastkd.ops._register import autograd, define, implement, part_of
from fastkd.reference.common import no_autocast, widen

NEAR = 2.0**-13
"""Below this share of the largest sample two samples are near: a cosine of inner products in float64 would be
off by more than float32's rounding.
"""
NUMBERS = 2**16
"""Of a chunk's differences and cosines. Some vertices are taken at once where the batch is small; one makes
(B, B) and (B, D).
"""


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    weight: float = 1.0,
) -> Tensor:
    """Differences of pairwise distances, and of the angles of all triples, between student and teacher.

    Args:
        student, teacher: (N, ...) floating point, flattened to (N, D); N >= 2 the same, the rest may differ.
        distance_weight: of the smooth-l1 mean (beta 1) over (N, N) of the distances, each side's divided by
            the mean of its positive ones.
        angle_weight: of the smooth-l1 mean over (N, N, N) of the cosines between e_j - e_i and e_k - e_i. At
            0 no triple is looked at.
        weight: multiplies the result.

    Returns: a scalar; float32, float64 if any input is float64. Equal samples have distance and cosine 0,
    with gradient 0. The sums run over a few vertices at a time, and the gradients are found with them: memory
    is O(N^2 + N D), never (N, N, D).
    Raises: TypeError, ValueError for what is not such a pair. A second derivative raises RuntimeError;
    ``fastkd.reference`` has one.
    Source: Park, Kim, Lu, Cho, *Relational knowledge distillation*, CVPR 2019; RepDistiller's weights.
    """
    checks.rkd_loss(student, teacher, distance_weight, angle_weight, weight)
    if transforming():
        weights = {"distance_weight": distance_weight, "angle_weight": angle_weight, "weight": weight}
        return reference.rkd_loss(student, teacher, **weights)
    factors = [float(weight) * float(factor) for factor in (distance_weight, angle_weight)]
    followed = torch.is_grad_enabled()
    needs = followed and student.requires_grad, followed and teacher.requires_grad
    # what a graph holds chooses when it runs
    if not torch.compiler.is_compiling() and (student.is_cuda or backends.current() == "triton"):
        impl = backends.select("rkd_pass", (student, teacher), no_kernel)
        if impl is TRITON:
            return RKDFunction.apply(impl, student.flatten(1), teacher.flatten(1), *factors, needs)
    s, t = (x.flatten(1) for x in widen(student, teacher))
    loss: Tensor = torch.ops.fastkd.rkd_loss.default(s, t, *factors, *needs)[0]
    return loss


def _loss(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient for s, for t); a gradient that nobody needs has no elements."""
    impl = backends.select("rkd_pass", (s, t), no_kernel)
    if impl is TRITON:
        return impl.run("rkd_pass", s, t, distance, angle, need_s, need_t)
    if impl is CPP and s.dtype == torch.float32:
        with no_autocast(s):
            found = _by_products(s, t, distance, angle, (need_s, need_t))
        if found is not None:
            return found
    return _by_vertices(s, t, distance, angle, need_s, need_t)


def _by_vertices(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch, by differences from some vertices at a time."""
    with no_autocast(s):
        grads = [torch.zeros_like(x) if need else x.new_empty(0) for x, need in ((s, need_s), (t, need_t))]
        loss = s.new_zeros(())
        pulls: list[Tensor | None] = [None, None]
        if distance:
            loss, pulls = _distances([_lengths(x, _chunks(s, t)) for x in (s, t)], distance, (need_s, need_t))
        if angle or need_s or need_t:
            for rows in _chunks(s, t):
                loss = loss + _vertices(rows, (s, t), angle, pulls, (need_s, need_t), grads)
    return loss, grads[0], grads[1]


def _by_products(
    s: Tensor, t: Tensor, distance: float, angle: float, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same by the library's kernels, in float64 but for the samples: with the inner products of all pairs
    a triple costs some twenty operations, whatever D is. None where samples are too near for that.

    A gradient is a matrix over the pairs times the samples. Its rows add up to 0, since what moves all
    samples alike changes nothing.
    """
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
    grads = []
    for x, side, matrix, pull, need in zip((s, t), sides, sums, pulls, needs, strict=True):
        if matrix is None and pull is None:
            grads.append(torch.zeros_like(x) if need else x.new_empty(0))
            continue
        if matrix is None:
            matrix = side.new_zeros((len(x), len(x)))
        if pull is not None:  # each pair is met twice, from either sample
            matrix = matrix.sub_(pull, alpha=2)
        matrix.fill_diagonal_(0)
        matrix.diagonal().copy_(-matrix.sum(1))
        grads.append((matrix @ side).to(x.dtype))
    return loss.to(s.dtype), grads[0], grads[1]


def _near(x: Tensor, lengths: Tensor) -> bool:
    """Whether two samples that are not equal are near, for their size."""
    shortest = lengths.masked_fill(lengths == 0, torch.inf).min()
    return bool(shortest < NEAR * torch.linalg.vector_norm(x, dim=1).max())


def _fake(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x) if need else x.new_empty(0) for x, need in ((s, need_s), (t, need_t))]
    return s.new_empty(()), grads[0], grads[1]


def _fake_pass(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`_fake`, but in float32 whatever the sides are in."""
    found = _fake(s, t, distance, angle, need_s, need_t)
    return found[0].float(), found[1].float(), found[2].float()


def _fake_angles(
    s_products: Tensor, s_inverses: Tensor, t_products: Tensor, t_inverses: Tensor, need_s: bool, need_t: bool
) -> tuple[Tensor, ...]:
    count = s_products.shape[0]
    sums = [s_products.new_empty((3, count, count) if need else 0) for need in (need_s, need_t)]
    return s_products.new_empty(()), *sums


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


class RKDFunction(torch.autograd.Function):
    """``apply(impl, s, t, distance, angle, needs)`` -> loss, of float16, bfloat16 or float32 (N, D) by one
    launcher, which finds the gradients of the sides that need one too.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: Backend, s: Tensor, t: Tensor, distance: float, angle: float, needs: tuple[bool, bool]
    ) -> Tensor:
        loss, *grads = impl.run("rkd_pass", s, t, distance, angle, *needs)
        save(ctx, grads, (s, t), needs)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [
            handed_out("rkd_loss", upstream, next(saved), next(saved), False)
            if need and upstream is not None
            else None
            for need in ctx.needs
        ]
        return None, *grads, None, None, None


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    save(ctx, output[1:], inputs[:2], inputs[-2:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    return (*scaled(ctx, "rkd_loss", upstream), *[None] * 4)


define(
    "rkd_loss(Tensor s, Tensor t, float distance, float angle, bool need_s, bool need_t)"
    " -> (Tensor loss, Tensor s_grad, Tensor t_grad)",
    _fake,
    only_cpu=True,
)
implement("rkd_loss", _loss)
autograd("rkd_loss", _gradients, _context, only_cpu=True)
part_of(
    "rkd_loss",
    "rkd_pass(Tensor s, Tensor t, float distance, float angle, bool need_s, bool need_t)"
    " -> (Tensor loss, Tensor s_grad, Tensor t_grad)",
    _fake_pass,
)
implement("rkd_pass", _by_vertices)
part_of(
    "rkd_loss",
    "rkd_lengths(Tensor x) -> Tensor",
    lambda x: x.new_empty((x.shape[0], x.shape[0]), dtype=torch.float64),
)
part_of(
    "rkd_loss",
    "rkd_angles(Tensor s_products, Tensor s_inverses, Tensor t_products, Tensor t_inverses, bool need_s,"
    " bool need_t) -> (Tensor loss, Tensor s_sums, Tensor t_sums)",
    _fake_angles,
)
