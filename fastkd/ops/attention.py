"""The attention-transfer loss: operators, autograd rules, public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import Backend
from fastkd._private import batched, few_frames, saved_tensors_hooked
from fastkd.checks import Features
from fastkd.ops import _batched_grads, _cuda_limits, _grad_prefetch
from fastkd.ops._attention_operators import (
    POOL_BEFORE,
    PREPARE,
    STUDENT_GRAD,
    STUDENT_IS_MAP,
    TEACHER_GRAD,
    TEACHER_IS_MAP,
    apart,
)
from fastkd.ops._options import AttentionOptions, OperatorOptions, attention_options
from fastkd.ops._register import autograd, wanting_gradients
from fastkd.ops.attention_map import AttentionMapFunction, attention_map

__all__ = ["AttentionMapFunction", "AttentionTransferFunction", "attention_map", "attention_transfer_loss"]


_prefetch = _grad_prefetch.GradPrefetch()


@few_frames
class AttentionTransferFunction(torch.autograd.Function):
    """``apply((impl, options, student, teacher, needed), *tensors)`` -> loss, for lists of features of which
    ``tensors`` need a gradient.

    ``needed``: the places of those in ``[*student, *teacher]``. The forward saves a coefficient a position, k
    = dloss/dq p (/ C for "mean") for an upstream gradient of 1, so that the backward is one streaming pass,
    dx = upstream k sign(x) |x|^(p-1), and the upstream gradient is applied before anything is rounded to x's
    dtype. Where the upstream gradient can be foreseen, the forward makes that pass too, for the student.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[Backend, OperatorOptions, Sequence[Tensor], Sequence[Tensor], Sequence[int]],
        *tensors: Tensor,
    ) -> Tensor:
        # one argument, since autograd looks at each
        impl, (options, numbers), student, teacher, needed = call
        stages = len(student)
        if needed[-1] >= stages:
            options |= TEACHER_GRAD
        upstream, ctx.expected = None, None
        if needed[0] < stages:
            options |= STUDENT_GRAD
            whole = len(needed) >= stages and needed[stages - 1] == stages - 1
            if whole and impl.prefetches and not options & STUDENT_IS_MAP and not saved_tensors_hooked():
                ctx.expected = _prefetch.expect()
                upstream = ctx.expected[1]
        if upstream is None:
            upstream = 0.0
        else:
            options |= PREPARE
        loss, coefficients, ctx.prepared = impl.run(
            "attention_transfer_loss", student, teacher, options, [upstream, *numbers]
        )
        if coefficients[0].dim() > 1:
            _warn(student, teacher, options, coefficients)
        elif student[0].dim() == 3:  # the coefficients of all stages are one tensor
            checks.tokens("attention_transfer_loss", student, teacher, *_are_maps(options))
        ctx.call = impl, options, numbers[0], needed, stages
        # only what needs a gradient: a teacher made under inference_mode cannot be saved
        if len(needed) < len(coefficients):
            first = 0 if options & STUDENT_GRAD else stages
            coefficients = [coefficients[i - first] for i in needed]
        ctx.save_for_backward(*tensors, *coefficients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, and once: autograd looks for changes in place here, and hooks may load from elsewhere
        saved = ctx.saved_tensors
        prepared = _grad_prefetch.take(ctx, grad, _prefetch)
        _, _, _, needed, stages = ctx.call
        if len(prepared) == len(needed) and needed[-1] < stages:  # the common case
            return None, *prepared
        made = dict(enumerate(prepared))
        return None, *_loss_gradients(ctx, saved, grad, ctx.needs_input_grad[1:], made)


def _warn(
    student: Sequence[Tensor], teacher: Sequence[Tensor], options: int, coefficients: Sequence[Tensor]
) -> None:
    if coefficients[0].dim() == 2:  # of features with three dimensions
        checks.tokens("attention_transfer_loss", student, teacher, *_are_maps(options))
    # Positions are counted on the coefficients, one each, since this costs the least. With pooling after the
    # power there are as many as before the pooling, so they do not tell.
    if options & POOL_BEFORE:
        batch = student[0].shape[0]
        for k in coefficients:
            if k.numel() == batch:
                break
        else:
            return
    checks.one_position(student, teacher, *_are_maps(options))


def _are_maps(options: int) -> tuple[bool, bool]:
    """(teacher_is_map, student_is_map)"""
    return bool(options & TEACHER_IS_MAP), bool(options & STUDENT_IS_MAP)


def _loss_gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], made: dict[int, Tensor]
) -> list[Tensor | None]:
    """The gradients of the features that need one, None where ``needs`` says so; ``made`` holds those that
    exist, by their place.
    """
    impl, options, p, needed, _ = ctx.call
    count = len(needed)
    out = [made.get(place) if need else None for place, need in zip(needed, needs)]
    left = [i for i, need in enumerate(needs) if need and out[i] is None]
    if left:
        coefficients = saved[count:]
        if coefficients[0].dim() == 1:
            coefficients = apart(coefficients[0], saved[:count])
        rest = [saved[i] for i in left], [coefficients[i] for i in left], p, options
        run = functools.partial(_batched_grads.scaled, impl) if batched(grad) else impl.run_backward
        for i, dx in zip(left, run("attention_transfer_loss_backward", grad, *rest), strict=True):
            out[i] = dx
    return out


def _graph_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    student, teacher, options, numbers = inputs
    ctx.mark_non_differentiable(*output[1], *output[2])
    stages = len(student)
    needed = [
        *(range(stages) if options & STUDENT_GRAD else ()),
        *(range(stages, 2 * stages) if options & TEACHER_GRAD else ()),
    ]
    ctx.call = ctx.impl, options, numbers[1], needed, stages
    ctx.save_for_backward(*[[*student, *teacher][i] for i in needed], *output[1])


def _graph_loss_backward(ctx: Any, grad: Tensor, *unused: list[Tensor | None]) -> tuple:
    _, _, _, needed, stages = ctx.call
    needs = [need for side in ctx.needs_input_grad[:2] for need in side]
    if any(need and i not in needed for i, need in enumerate(needs)):
        raise RuntimeError(
            "fastkd::attention_transfer_loss: a tensor needs a gradient, but student_grad or teacher_grad was"
            " false"
        )
    found = _loss_gradients(ctx, ctx.saved_tensors, grad, [needs[i] for i in needed], {})
    by_place = dict(zip(needed, found))
    out = [by_place.get(i) for i in range(len(needs))]
    return out[:stages], out[stages:], None, None


autograd("attention_transfer_loss", _graph_loss_backward, _graph_loss_context)


def attention_transfer_loss(
    student: Features,
    teacher: Features,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
    pool: str = "before",
    pool_mode: str = "avg",
    difference: str = "squared",
    stage_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    teacher_is_map: bool = False,
    student_is_map: bool = False,
    channel_dim: int = 1,
) -> Tensor:
    """Attention-transfer loss: the distance of the attention maps of student and teacher, over all stages.

    Args:
        student, teacher: a tensor, or several, one a stage, (N, C, *S): a list, a tuple, a dict (its values)
            or a generator, in its order. C, dtype and spatial size may differ between the two.
        p, channel_reduce, signed, eps, eps_mode: of the maps, as in :func:`attention_map`.
        pool, pool_mode: where spatial sizes differ, both are pooled (adaptively, "avg" or "max") to the
            smaller size in each dimension, "before" or "after" the power and the channel reduction.
        difference: "squared", the mean over N and S of the squared difference, or "l2", the mean over N of
            its l2 norm.
        stage_reduce, weights: "sum" or "mean" of the stages' terms, each multiplied by its weight.
        weight: multiplies the loss, such as the published 1000. It is applied in float32, as a factor of the
            result is: before a half-precision gradient is rounded.
        teacher_is_map: ``teacher`` holds normalized maps (N, *S), no larger than the student's features: a
            normalized map is not pooled.
        student_is_map: ``student`` does, as :func:`tap` and :func:`relu_tap` make them; no larger than the
            teacher's features, and of equal size where both are maps. The switches of the maps then hold for
            the other side alone.
        channel_dim: where C stands: 1, or -1 for views (N, *S, C) and tokens (N, L, C), without a copy. Maps
            have no channels.

    Returns: a scalar, float32 (float64 if any input is float64); differentiable in student and teacher.
    Equals ``weight * sum((attention_map(s) - attention_map(t)).square().mean() for s, t in zip(student,
    teacher))`` at the defaults.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017, and its published
    implementations (see the presets).
    """
    student, teacher = checks.listed(student), checks.listed(teacher)
    if channel_dim != 1 or type(channel_dim) is not int:
        student = student if student_is_map else checks.channels_second(student, channel_dim)
        teacher = teacher if teacher_is_map else checks.channels_second(teacher, channel_dim)
    given = (
        p,
        channel_reduce,
        signed,
        eps,
        eps_mode,
        pool,
        pool_mode,
        difference,
        stage_reduce,
        weights,
        weight,
        teacher_is_map,
        student_is_map,
    )
    impl = backends.select(
        "attention_transfer_loss", (student, teacher), _cuda_limits.attention_transfer_loss, given
    )
    if impl.name == "reference":
        return reference.attention_transfer_loss(student, teacher, **AttentionOptions(*given).keywords())
    if torch.compiler.is_compiling():
        return _loss_in_graph(impl, student, teacher, AttentionOptions(*given))
    try:
        options = attention_options(given)
        students, teachers = checks.stages("student", student), checks.stages("teacher", teacher)
        needed, tensors = wanting_gradients(students, teachers)
        if tensors:
            return AttentionTransferFunction.apply((impl, options, students, teachers, needed), *tensors)
        # an autograd.Function would cost 3 microseconds for nothing
        bits, numbers = options
        return impl.run("attention_transfer_loss", students, teachers, bits, [0.0, *numbers])[0]
    except Exception:
        checks.explain(checks.attention_transfer, student, teacher, *given[:2], *given[3:])
        raise


def _loss_in_graph(impl: Backend, student: Features, teacher: Features, given: AttentionOptions) -> Tensor:
    options, (p, eps, weight, *weights) = given.validated()
    students, teachers = checks.attention_transfer(student, teacher, *given[:2], *given[3:])  # type: ignore[arg-type]
    for tensors, bit in ((students, STUDENT_GRAD), (teachers, TEACHER_GRAD)):
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            options |= bit
    # the weight outside, since it may be a number that only the graph knows, and a number among an operator's
    # arguments is a constant of the graph. It still reaches the gradients in float32
    numbers = [0.0, p, eps, 1.0, *weights]
    return impl.graph_op("attention_transfer_loss")(students, teachers, options, numbers)[0] * weight
