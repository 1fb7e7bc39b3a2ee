"""Attention maps and the attention-transfer loss: operators, autograd rules, public functions."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd.checks import Features
from fastkd.ops._grad_prefetch import Upstream, hooked, take_prepared
from fastkd.ops._register import (
    accumulator,
    autograd,
    by_reference,
    call,
    call_unrecorded,
    caller,
    define,
    differentiable_once,
    in_cuda,
    one_device,
    one_for_all,
    recorded,
    smaller,
    traced,
)  # fmt: skip

_MAP = "float p, str channel_reduce, bool signed, bool normalize, float eps, str eps_mode"

# The loss has many switches, and a string argument costs an operator's caller half a microsecond: they travel as bits of one integer, which
# csrc/cpu/attention.h spells out again. One name a bit, its value when the bit is clear and when it is set.
_SWITCHES = (
    ("channel_reduce", "sum", "mean"),
    ("signed", False, True),
    ("eps_mode", "clamp", "add"),
    ("pool", "after", "before"),
    ("pool_mode", "avg", "max"),
    ("difference", "squared", "l2"),
    ("stage_reduce", "sum", "mean"),
    ("teacher_is_map", False, True),
    ("student_is_map", False, True),
)
_BIT = {name: 1 << i for i, (name, _, _) in enumerate(_SWITCHES)}
# every valid combination, in the order above
_BITS = {
    tuple(values[1 + bit] for values, bit in zip(_SWITCHES, bits)): sum(bit << i for i, bit in enumerate(bits))
    for bits in itertools.product((0, 1), repeat=len(_SWITCHES))
}


def _map_fake(x: Tensor, p: Any, channel_reduce: Any, signed: Any, normalize: bool, eps: Any, eps_mode: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator([x])
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype), x.new_empty((x.shape[0] if normalize else 0,), dtype=dtype)


def _map_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _coefficient_size(x: Tensor, is_map: bool, other: Sequence[int], switches: int) -> list[int]:
    return list(x.shape) if is_map else [x.shape[0], *(smaller(x.shape[2:], other) if switches & _BIT["pool"] else x.shape[2:])]


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], p: Any, eps: Any, switches: int, weights: Any, weight: Any,
    student_grad: bool, teacher_grad: bool, upstream: float | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    one_device(student + teacher)
    dtype = accumulator(student + teacher)
    s_map, t_map = (bool(switches & _BIT[name]) for name in ("student_is_map", "teacher_is_map"))
    sizes = []
    if student_grad:
        sizes += [_coefficient_size(s, s_map, t.shape[1 if t_map else 2 :], switches) for s, t in zip(student, teacher)]
    if teacher_grad:
        sizes += [_coefficient_size(t, t_map, s.shape[1 if s_map else 2 :], switches) for s, t in zip(student, teacher)]
    gradients = [torch.empty_like(x) for x in student] if student_grad and upstream is not None and not s_map else []
    return student[0].new_empty((), dtype=dtype), [student[0].new_empty(size, dtype=dtype) for size in sizes], gradients


def _loss_backward_fake(grad: Tensor, features: list[Tensor], coefficients: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in features]


define(f"attention_map(Tensor x, {_MAP}) -> (Tensor map, Tensor norm)", _map_fake)
define(f"attention_map_backward(Tensor grad, Tensor x, Tensor map, Tensor norm, {_MAP}) -> Tensor", _map_backward_fake)
define(
    "attention_transfer_loss(Tensor[] student, Tensor[] teacher, float p, float eps, int switches, float[]? weights, float weight, "
    "bool student_grad, bool teacher_grad, float? upstream) -> (Tensor loss, Tensor[] coefficients, Tensor[] gradients)",
    _loss_fake,
)
define(
    "attention_transfer_loss_backward(Tensor grad, Tensor[] features, Tensor[] coefficients, float p, int switches) -> Tensor[]",
    _loss_backward_fake,
)
differentiable_once("attention_map_backward", "attention_map")
differentiable_once("attention_transfer_loss_backward", "attention_transfer_loss")

_map = torch.ops.fastkd.attention_map.default
_map_backward = torch.ops.fastkd.attention_map_backward.default
_loss = torch.ops.fastkd.attention_transfer_loss.default
_loss_backward = torch.ops.fastkd.attention_transfer_loss_backward.default


class AttentionMapFunction(torch.autograd.Function):
    """``apply(x, p, channel_reduce, signed, normalize, eps, eps_mode)`` -> map.

    With q = reduce_c |x|^p, n = ||q||, y = q / max(n, eps) and g the incoming gradient:
    dq = (g - y <g, y>) / n where n > eps, g / eps elsewhere;  dx = p sign(x) |x|^(p-1) dq, divided by C for "mean".
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        return _map_forward(ctx, caller(x), x, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _map_gradients(ctx, grad)


class _CudaAttentionMapFunction(AttentionMapFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        return _map_forward(ctx, in_cuda, x, *options)


def _map_forward(ctx: Any, run: Callable[..., Any], x: Tensor, *options: Any) -> Tensor:
    y, norm = run(_map, x, *options)
    ctx.save_for_backward(x, y, norm)
    ctx.call, ctx.options = run, options
    return y


def _map_gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, norm = ctx.saved_tensors
    if backends.batched(grad):
        names = ("p", "channel_reduce", "signed", "normalize", "eps", "eps_mode")
        formula = functools.partial(reference.attention_map, **dict(zip(names, ctx.options, strict=True)))
        (dx,) = by_reference(formula, [x], [True], grad)
    else:
        dx = ctx.call(_map_backward, grad, x, y, norm, *ctx.options)
    return dx, *(None for _ in ctx.options)


def _traced_map_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[1:]


autograd("attention_map", _map_gradients, _traced_map_context)


_upstream = Upstream()


class AttentionTransferFunction(torch.autograd.Function):
    """``apply(stages, options, *student, *teacher)`` -> loss.

    The forward saves a coefficient a position, k = dloss/dq p (/ C for "mean") for an upstream gradient of 1, so that the backward is one
    streaming pass, dx = upstream k sign(x) |x|^(p-1), and the upstream gradient is applied before anything is rounded to x's dtype. Where
    the upstream gradient can be foreseen, the forward makes that pass too, for the student.
    """

    @staticmethod
    def forward(ctx: Any, stages: int, options: tuple, *tensors: Tensor) -> Tensor:
        return _loss_forward(ctx, caller(tensors[0]), stages, options, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, and once: autograd looks for changes in place here, and hooks may load from elsewhere
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        prepared = take_prepared(ctx, grad, _upstream)
        if prepared:
            rest = needs[ctx.stages :]
            others = _feature_gradients(ctx, saved, grad, (False,) * ctx.stages + rest)[ctx.stages :] if any(rest) else (None,) * ctx.stages
            return None, None, *prepared, *others
        return None, None, *_feature_gradients(ctx, saved, grad, needs)


class _CudaAttentionTransferFunction(AttentionTransferFunction):
    @staticmethod
    def forward(ctx: Any, stages: int, options: tuple, *tensors: Tensor) -> Tensor:
        return _loss_forward(ctx, in_cuda, stages, options, tensors)


def _loss_forward(ctx: Any, run: Callable[..., Any], stages: int, options: tuple, tensors: tuple[Tensor, ...]) -> Tensor:
    needs = ctx.needs_input_grad[2:]
    student_grad, teacher_grad = any(needs[:stages]), any(needs[stages:])
    # a GPU's gradient must not be read by the host, and has no cache to wait in
    foreseeing = student_grad and run is call and not options[2] & _BIT["student_is_map"] and not hooked()
    ctx.situation, ctx.expected = _upstream.expect() if foreseeing else (None, None)
    loss, coefficients, ctx.prepared = run(_loss, tensors[:stages], tensors[stages:], *options, student_grad, teacher_grad, ctx.expected)
    # counted on the coefficients, one a position, since this costs the least; they are as many as before a pooling that comes after
    batch = tensors[0].shape[0]
    if not options[2] & _BIT["pool"] or any(k.numel() == batch for k in coefficients):
        checks.one_position(
            tensors[:stages], tensors[stages:], bool(options[2] & _BIT["teacher_is_map"]), bool(options[2] & _BIT["student_is_map"])
        )
    # a teacher made under inference_mode cannot be saved: only what needs a gradient is
    wanted = [i for i, need in enumerate(needs) if need]
    skipped = 0 if student_grad else stages
    ctx.save_for_backward(*[tensors[i] for i in wanted], *[coefficients[i - skipped] for i in wanted])
    ctx.call, ctx.stages, ctx.wanted, ctx.options = run, stages, wanted, options
    return loss


def _feature_gradients(ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of student and teacher features, None where ``needs`` says so or the forward kept nothing."""
    kept = len(ctx.wanted)
    pairs = [(i, saved[j], saved[kept + j]) for j, i in enumerate(ctx.wanted) if needs[i]]
    p, _, switches, *_ = ctx.options
    run = one_for_all(ctx.call) if backends.batched(grad) else ctx.call
    computed = run(_loss_backward, grad, [x for _, x, _ in pairs], [k for _, _, k in pairs], p, switches)
    out: list[Tensor | None] = [None] * len(needs)
    for (i, _, _), dx in zip(pairs, computed, strict=True):
        out[i] = dx
    return out


def _traced_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    student, teacher, *options, student_grad, teacher_grad, _ = inputs
    ctx.mark_non_differentiable(*output[1], *output[2])
    features = (list(student) if student_grad else []) + (list(teacher) if teacher_grad else [])
    first = 0 if student_grad else len(student)
    ctx.save_for_backward(*features, *output[1])
    ctx.wanted, ctx.options, ctx.stages = list(range(first, first + len(features))), options, len(student)


def _traced_loss_backward(ctx: Any, grad: Tensor, *unused: list[Tensor | None]) -> tuple:
    student_needs, teacher_needs = ctx.needs_input_grad[:2]
    needs = [*student_needs, *teacher_needs]
    if any(need and i not in ctx.wanted for i, need in enumerate(needs)):
        raise RuntimeError("fastkd::attention_transfer_loss: a tensor needs a gradient, but student_grad or teacher_grad was false")
    out = _feature_gradients(ctx, ctx.saved_tensors, grad, needs)
    return out[: ctx.stages], out[ctx.stages :], *(None for _ in ctx.options), None, None, None


autograd("attention_transfer_loss", _traced_loss_backward, _traced_loss_context)


def attention_map(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    normalize: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> Tensor:
    """Attention map of a feature: where its energy lies.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        p: power, from 1 to 16.
        channel_reduce: "mean" or "sum" over C.
        signed: x^p instead of abs(x)^p (negative x under a fractional p gives NaN).
        normalize: divide each sample's map by its l2 norm over S.
        eps, eps_mode: the divisor is max(norm, eps) for "clamp", norm + eps for "add".

    Returns: (N, *S), float32 (float64 for a float64 x).
    Equals ``F.normalize(x.float().abs().pow(p).mean(1).flatten(1)).view(N, *S)`` at the defaults.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    backend = backends.choose("attention_map", (x,), lambda: backends.why_not_cuda_map(p))
    if backend == "reference":
        return reference.attention_map(x, p, channel_reduce=channel_reduce, signed=signed, normalize=normalize, eps=eps, eps_mode=eps_mode)
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    if torch.compiler.is_compiling():
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        return traced(backend, _map)(x, p, channel_reduce, signed, normalize, eps, eps_mode)[0]
    try:
        function = _CudaAttentionMapFunction if backend == "cuda" else AttentionMapFunction
        return function.apply(x, p, channel_reduce, signed, normalize, eps, eps_mode)
    except Exception:
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        raise


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
    """Attention-transfer loss: the distance of student and teacher attention maps, over all stages in one call.

    Args:
        student, teacher: a tensor, or several, one a stage, (N, C, *S): a list, a tuple, a dict (its values) or a generator, in its order.
            C, dtype and spatial size may differ between the two.
        p, channel_reduce, signed, eps, eps_mode: of the maps, as in :func:`attention_map`.
        pool, pool_mode: where spatial sizes differ, both are pooled (adaptively, "avg" or "max") to the smaller size in each dimension,
            "before" or "after" the power and the channel reduction.
        difference: "squared", the mean over N and S of the squared difference, or "l2", the mean over N of its l2 norm.
        stage_reduce, weights: "sum" or "mean" of the stages' terms, each multiplied by its weight.
        weight: multiplies the loss. The published 1000 belongs here: it is applied in float32, before a half-precision gradient is rounded.
        teacher_is_map: ``teacher`` holds normalized maps (N, *S), no larger than the student's features: a normalized map is not pooled.
        student_is_map: ``student`` does, as :func:`tap` and :func:`relu_tap` make them; no larger than the teacher's features, and of equal
            size where both are maps. The switches of the maps then hold for the other side alone.

    Returns: a scalar, float32 (float64 if any input is float64); differentiable in student and teacher.
    Equals ``weight * sum((attention_map(s) - attention_map(t)).square().mean() for s, t in zip(student, teacher))`` at the defaults.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017, and its published implementations (see the presets).
    """
    student, teacher = checks.listed(student), checks.listed(teacher)
    backend = backends.choose(
        "attention_transfer_loss",
        (student, teacher),
        lambda: backends.why_not_cuda_loss(student, teacher, p, teacher_is_map, student_is_map),
    )
    if backend == "reference":
        return reference.attention_transfer_loss(
            student, teacher, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode, pool=pool, pool_mode=pool_mode,
            difference=difference, stage_reduce=stage_reduce, weights=weights, weight=weight, teacher_is_map=teacher_is_map,
            student_is_map=student_is_map,
        )  # fmt: skip

    if not checks.are_floats(p, eps, weight):
        p, eps, weight = checks.constant("p", p), checks.constant("eps", eps), checks.number("weight", weight)
    weights = checks.stage_weights(weights, convert=checks.constant)
    switches = (
        channel_reduce,
        bool(signed),
        eps_mode,
        pool,
        pool_mode,
        difference,
        stage_reduce,
        bool(teacher_is_map),
        bool(student_is_map),
    )
    failure = None
    if not torch.compiler.is_compiling():
        try:
            options = (p, eps, _BITS[switches], weights, weight)
            students, teachers = checks.stages("student", student), checks.stages("teacher", teacher)
            if not recorded(students) and not recorded(teachers):
                return call_unrecorded(backend, students[0], _loss, students, teachers, *options, False, False, None)[0]
            function = _CudaAttentionTransferFunction if backend == "cuda" else AttentionTransferFunction
            return function.apply(len(students), options, *students, *teachers)
        except Exception as error:
            failure = error
    # the weight has been looked at, and may be a number that only the graph knows
    students, teachers = checks.attention_transfer(
        student, teacher, p, channel_reduce, eps, eps_mode, pool, pool_mode, difference, stage_reduce, weights, 1.0, teacher_is_map,
        student_is_map,
    )  # fmt: skip
    if failure:  # not the arguments' fault
        raise failure
    needs = [torch.is_grad_enabled() and any(x.requires_grad for x in tensors) for tensors in (students, teachers)]
    # the weight outside: a number among an operator's arguments is a constant of the graph. It still reaches
    # the gradients in float32
    return traced(backend, _loss)(students, teachers, p, eps, _BITS[switches], weights, 1.0, *needs, None)[0] * weight
