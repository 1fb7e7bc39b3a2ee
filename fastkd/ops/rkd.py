"""Relational knowledge distillation: distances and angles between samples, in O(B^2) memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import CPP, REFERENCE, TRITON, Backend
from fastkd._private import dispatch_watched, few_frames, is_wrapper, transforming
from fastkd.ops._cuda_limits import no_kernel
from fastkd.ops._gradients import save, scaled, where_needed
from fastkd.ops._register import autograd, define, implement, part_of
from fastkd.ops._rkd_forms import by_products, by_vertices
from fastkd.reference.common import widen


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
    with gradient 0. The gradients are found with the loss. Memory is O(N^2 + N D), never (N, N, D): Triton's
    kernels and the C++ library's keep matrices over pairs, plain PyTorch looks at a few vertices at a time.
    Raises: TypeError, ValueError for what is not such a pair. A second derivative raises RuntimeError;
    ``fastkd.reference`` has one.
    Source: Park, Kim, Lu, Cho, *Relational knowledge distillation*, CVPR 2019; RepDistiller's weights.
    """
    checks.rkd_loss(student, teacher, distance_weight, angle_weight, weight)
    # only the reference supports tensor wrappers and transforms; graphs and dispatch modes get the operator
    beyond = is_wrapper(student) or transforming()
    impl = None
    if beyond or not (torch.compiler.is_compiling() or dispatch_watched()):
        impl = backends.select("rkd_pass", (student, teacher), no_kernel)
        if beyond and impl is REFERENCE:
            weights = {"distance_weight": distance_weight, "angle_weight": angle_weight, "weight": weight}
            return reference.rkd_loss(student, teacher, **weights)
    factors = [float(weight) * float(factor) for factor in (distance_weight, angle_weight)]
    followed = torch.is_grad_enabled()
    needs = followed and student.requires_grad, followed and teacher.requires_grad
    # Triton's kernels read each side in its own dtype, all other implementations take one dtype
    s, t = (x.flatten(1) for x in ((student, teacher) if impl is TRITON else widen(student, teacher)))
    loss: Tensor
    if impl is None:
        loss = torch.ops.fastkd.rkd_loss.default(s, t, *factors, *needs)[0]
    else:
        loss = RKDFunction.apply(impl, s, t, *factors, needs)
    return loss


def _loss(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of graphs, which selects a backend each time it runs."""
    return _loss_by(backends.select("rkd_pass", (s, t), no_kernel), s, t, distance, angle, need_s, need_t)


def _loss_by(
    impl: Backend, s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its gradient for s, for t); a gradient that nobody needs has no elements."""
    if impl is TRITON:
        return impl.run("rkd_pass", s, t, distance, angle, need_s, need_t)
    if impl is CPP and s.dtype == torch.float32:
        found = by_products(s, t, distance, angle, (need_s, need_t))
        if found is not None:
            return found
    return by_vertices(s, t, distance, angle, need_s, need_t)


def _fake(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = where_needed(torch.empty_like, (s, t), (need_s, need_t))
    return s.new_empty(()), grads[0], grads[1]


def _pass_elsewhere(
    s: Tensor, t: Tensor, distance: float, angle: float, need_s: bool, need_t: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``rkd_pass`` on devices without Triton, for the dtypes that Triton's takes."""
    for name, x in (("s", s), ("t", t)):
        if x.dtype == torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {x.dtype}")
    return by_vertices(s.float(), t.float(), distance, angle, need_s, need_t)


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


@few_frames
class RKDFunction(torch.autograd.Function):
    """``apply(impl, s, t, distance, angle, needs)`` -> loss, of (N, D), with the gradients of the sides that
    need one. Triton reads each side in its own dtype, others take one dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: Backend, s: Tensor, t: Tensor, distance: float, angle: float, needs: tuple[bool, bool]
    ) -> Tensor:
        loss, *grads = _loss_by(impl, s, t, distance, angle, *needs)
        save(ctx, grads, (s, t), needs)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *scaled(ctx, "rkd_loss", upstream), None, None, None


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    save(ctx, output[1:], inputs[:2], inputs[-2:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    return (*scaled(ctx, "rkd_loss", upstream), *[None] * 4)


define(
    "rkd_loss(Tensor s, Tensor t, float distance, float angle, bool need_s, bool need_t)"
    " -> (Tensor loss, Tensor s_grad, Tensor t_grad)",
    _fake,
    one_namespace=True,
)
implement("rkd_loss", _loss)
autograd("rkd_loss", _gradients, _context, one_namespace=True)
part_of(
    "rkd_loss",
    "rkd_pass(Tensor s, Tensor t, float distance, float angle, bool need_s, bool need_t)"
    " -> (Tensor loss, Tensor s_grad, Tensor t_grad)",
    _fake_pass,
)
implement("rkd_pass", _pass_elsewhere)
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
