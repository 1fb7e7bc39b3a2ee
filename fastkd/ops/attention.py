"""The attention-transfer loss: operators, autograd rules, public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import Backend
from fastkd._private import batched, saved_tensors_hooked
from fastkd.checks import Features
from fastkd.ops import _batched_grads, _cuda_limits, _grad_prefetch
from fastkd.ops._options import BIT, AttentionOptions, OperatorOptions, validated, validated_once
from fastkd.ops._register import (
    accumulator,
    autograd,
    define,
    differentiable_once,
    one_device,
    smaller,
    wanting_gradients,
)
from fastkd.ops.attention_map import AttentionMapFunction, attention_map

__all__ = ["AttentionMapFunction", "AttentionTransferFunction", "attention_map", "attention_transfer_loss"]


def _coefficient_size(x: Tensor, is_map: bool, other: Sequence[int], switches: int) -> list[int]:
    return (
        list(x.shape)
        if is_map
        else [x.shape[0], *(smaller(x.shape[2:], other) if switches & BIT["pool"] else x.shape[2:])]
    )


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], p: Any, eps: Any, switches: int, weights: Any, weight: Any,
    student_grad: bool, teacher_grad: bool, upstream: float | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    one_device(student + teacher)
    dtype = accumulator(student + teacher)
    s_map, t_map = (bool(switches & BIT[name]) for name in ("student_is_map", "teacher_is_map"))
    sizes = []
    if student_grad:
        sizes += [
            _coefficient_size(s, s_map, t.shape[1 if t_map else 2 :], switches)
            for s, t in zip(student, teacher)
        ]
    if teacher_grad:
        sizes += [
            _coefficient_size(t, t_map, s.shape[1 if s_map else 2 :], switches)
            for s, t in zip(student, teacher)
        ]
    gradients = (
        [torch.empty_like(x) for x in student] if student_grad and upstream is not None and not s_map else []
    )
    return (
        student[0].new_empty((), dtype=dtype),
        [student[0].new_empty(size, dtype=dtype) for size in sizes],
        gradients,
    )


def _loss_backward_fake(
    grad: Tensor, features: list[Tensor], coefficients: list[Tensor], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


define(
    "attention_transfer_loss(Tensor[] student, Tensor[] teacher, float p, float eps, int switches, float[]?"
    " weights, float weight, bool student_grad, bool teacher_grad, float? upstream) -> (Tensor loss, Tensor[]"
    " coefficients, Tensor[] gradients)",
    _loss_fake,
)
define(
    "attention_transfer_loss_backward(Tensor grad, Tensor[] features, Tensor[] coefficients, float p, int"
    " switches) -> Tensor[]",
    _loss_backward_fake,
)
differentiable_once("attention_transfer_loss_backward")


_prefetch = _grad_prefetch.GradPrefetch()


class AttentionTransferFunction(torch.autograd.Function):
    """``apply(impl, options, student, teacher, needed, *tensors)`` -> loss, for lists of features of which
    ``tensors`` need a gradient.

    ``needed``: the places of those in ``[*student, *teacher]``. The forward saves a coefficient a position, k
    = dloss/dq p (/ C for "mean") for an upstream gradient of 1, so that the backward is one streaming pass,
    dx = upstream k sign(x) |x|^(p-1), and the upstream gradient is applied before anything is rounded to x's
    dtype. Where the upstream gradient can be foreseen, the forward makes that pass too, for the student.
    """

    @staticmethod
    def forward(
        ctx: Any,
        impl: Backend,
        options: OperatorOptions,
        student: Sequence,
        teacher: Sequence,
        needed: Sequence[int],
        *tensors: Tensor,
    ) -> Tensor:
        stages, bits = len(student), options[2]
        student_grad, teacher_grad = needed[0] < stages, needed[-1] >= stages
        foreseeing = (
            student_grad
            and impl.prefetches
            and not bits & BIT["student_is_map"]
            and not saved_tensors_hooked()
        )
        ctx.expected = expected = _prefetch.expect() if foreseeing else None
        upstream = expected[1] if expected else None
        loss, coefficients, ctx.prepared = impl.run(
            "attention_transfer_loss", student, teacher, *options, student_grad, teacher_grad, upstream
        )
        _warn(student, teacher, bits, coefficients)
        ctx.impl, ctx.options, ctx.needed, ctx.stages = impl, options, needed, stages
        # only what needs a gradient: a teacher made under inference_mode cannot be saved
        if len(needed) < len(coefficients):
            first = 0 if student_grad else stages
            coefficients = [coefficients[i - first] for i in needed]
        ctx.save_for_backward(*tensors, *coefficients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, and once: autograd looks for changes in place here, and hooks may load from elsewhere
        saved = ctx.saved_tensors
        prepared = _grad_prefetch.take(ctx, grad, _prefetch)
        if len(prepared) == len(ctx.needed) and ctx.needed[-1] < ctx.stages:  # the common case
            return None, None, None, None, None, *prepared
        made = dict(enumerate(prepared))
        return (
            None,
            None,
            None,
            None,
            None,
            *_loss_gradients(ctx, saved, grad, ctx.needs_input_grad[5:], made),
        )


def _warn(
    student: Sequence[Tensor], teacher: Sequence[Tensor], bits: int, coefficients: Sequence[Tensor]
) -> None:
    first = coefficients[0]
    if first.dim() == 2:  # of features with three dimensions
        checks.tokens("attention_transfer_loss", student, teacher, *_are_maps(bits))
    # counted on the coefficients, one a position, since this costs the least; they are as many as before a
    # pooling that comes after
    if bits & BIT["pool"]:
        batch = first.shape[0]
        for k in coefficients:
            if k.numel() == batch:
                break
        else:
            return
    checks.one_position(student, teacher, *_are_maps(bits))


def _are_maps(bits: int) -> tuple[bool, bool]:
    """(teacher_is_map, student_is_map)"""
    return bool(bits & BIT["teacher_is_map"]), bool(bits & BIT["student_is_map"])


def _loss_gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], made: dict[int, Tensor]
) -> list[Tensor | None]:
    """The gradients of the features at ``ctx.needed``, None where ``needs`` says so; ``made`` holds those
    that exist, by their place.
    """
    count = len(ctx.needed)
    out = [made.get(place) if need else None for place, need in zip(ctx.needed, needs)]
    left = [i for i, need in enumerate(needs) if need and out[i] is None]
    if left:
        rest = [saved[i] for i in left], [saved[count + i] for i in left], ctx.options[0], ctx.options[2]
        run = functools.partial(_batched_grads.scaled, ctx.impl) if batched(grad) else ctx.impl.run_backward
        for i, dx in zip(left, run("attention_transfer_loss_backward", grad, *rest), strict=True):
            out[i] = dx
    return out


def _graph_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    student, teacher, *ctx.options, student_grad, teacher_grad, _ = inputs
    ctx.mark_non_differentiable(*output[1], *output[2])
    stages = len(student)
    ctx.needed = [
        *(range(stages) if student_grad else ()),
        *(range(stages, 2 * stages) if teacher_grad else ()),
    ]
    ctx.save_for_backward(*[[*student, *teacher][i] for i in ctx.needed], *output[1])


def _graph_loss_backward(ctx: Any, grad: Tensor, *unused: list[Tensor | None]) -> tuple:
    needs = [need for side in ctx.needs_input_grad[:2] for need in side]
    if any(need and i not in ctx.needed for i, need in enumerate(needs)):
        raise RuntimeError(
            "fastkd::attention_transfer_loss: a tensor needs a gradient, but student_grad or teacher_grad was"
            " false"
        )
    found = _loss_gradients(ctx, ctx.saved_tensors, grad, [needs[i] for i in ctx.needed], {})
    by_place = dict(zip(ctx.needed, found))
    out, stages = [by_place.get(i) for i in range(len(needs))], len(needs) // 2
    return out[:stages], out[stages:], *(None for _ in ctx.options), None, None, None


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
) -> Tensor:
    """Attention-transfer loss: the distance of student and teacher attention maps, over all stages in one
    call.

    Args:
        student, teacher: a tensor, or several, one a stage, (N, C, *S): a list, a tuple, a dict (its values)
        or a generator, in its order.
            C, dtype and spatial size may differ between the two.
        p, channel_reduce, signed, eps, eps_mode: of the maps, as in :func:`attention_map`.
        pool, pool_mode: where spatial sizes differ, both are pooled (adaptively, "avg" or "max") to the
        smaller size in each dimension,
            "before" or "after" the power and the channel reduction.
        difference: "squared", the mean over N and S of the squared difference, or "l2", the mean over N of
        its l2 norm.
        stage_reduce, weights: "sum" or "mean" of the stages' terms, each multiplied by its weight.
        weight: multiplies the loss. The published 1000 belongs here: it is applied in float32, before a
        half-precision gradient is rounded.
        teacher_is_map: ``teacher`` holds normalized maps (N, *S), no larger than the student's features: a
        normalized map is not pooled.
        student_is_map: ``student`` does, as :func:`tap` and :func:`relu_tap` make them; no larger than the
        teacher's features, and of equal
            size where both are maps. The switches of the maps then hold for the other side alone.

    Returns: a scalar, float32 (float64 if any input is float64); differentiable in student and teacher.
    Equals ``weight * sum((attention_map(s) - attention_map(t)).square().mean() for s, t in zip(student,
    teacher))`` at the defaults.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017, and its published
    implementations (see the presets).
    """
    student, teacher = checks.listed(student), checks.listed(teacher)
    given = (
        p, channel_reduce, signed, eps, eps_mode, pool, pool_mode, difference, stage_reduce, weights, weight, teacher_is_map, student_is_map
    )  # fmt: skip
    impl = backends.select(
        "attention_transfer_loss", (student, teacher), _cuda_limits.attention_transfer_loss, given
    )
    if impl.name == "reference":
        return reference.attention_transfer_loss(student, teacher, **AttentionOptions(*given).keywords())
    if torch.compiler.is_compiling():
        return _loss_in_graph(impl, student, teacher, AttentionOptions(*given))
    try:
        options = validated_once(given)
        students, teachers = checks.stages("student", student), checks.stages("teacher", teacher)
        needed, tensors = wanting_gradients(students, teachers)
        if tensors:
            return AttentionTransferFunction.apply(impl, options, students, teachers, needed, *tensors)
        # an autograd.Function would cost 3 microseconds for nothing
        return impl.run("attention_transfer_loss", students, teachers, *options, False, False, None)[0]
    except Exception:
        checks.explain(checks.attention_transfer, student, teacher, *given[:2], *given[3:])
        raise


def _loss_in_graph(impl: Backend, student: Features, teacher: Features, given: AttentionOptions) -> Tensor:
    p, eps, bits, weights, weight = validated(given)
    students, teachers = checks.attention_transfer(student, teacher, *given[:2], *given[3:])  # type: ignore[arg-type]
    needs = [
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors) for tensors in (students, teachers)
    ]
    # the weight outside, since it may be a number that only the graph knows, and a number among an operator's
    # arguments is a constant of the graph. It still reaches the gradients in float32
    return (
        impl.graph_op("attention_transfer_loss")(
            students, teachers, p, eps, bits, weights, 1.0, *needs, None
        )[0]
        * weight
    )
