"""FSP (flow of solution procedure) matrices and the FSP loss: operators, autograd rules, public functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, kernels, reference
from fastkd.checks import Features
from fastkd.kernels.gram_kept import kept_shape, wide_stages
from fastkd.ops import flops
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
    traced,
)  # fmt: skip


def _matrix_fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    one_device([a, b])
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=accumulator([a, b]))


def _matrix_backward_fake(grad: Tensor, a: Tensor, b: Tensor, pool_mode: Any, precision: Any, a_grad: bool, b_grad: bool) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in ((a, a_grad), (b, b_grad)) if need]


def _loss_fake(
    student: list[Tensor], teacher: list[Tensor], pool_mode: Any, distance: Any, pair_reduce: Any, weights: Any, weight: Any,
    precision: Any, with_grad: bool, upstream: float | None = None, stages: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    one_device(student + teacher)
    dtype, first = accumulator(student + teacher), student[0]
    pairs = zip(student, student[1:], strict=False) if with_grad else ()
    gram_grads = [first.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=dtype) for a, b in pairs]
    return first.new_empty((), dtype=dtype), gram_grads, [torch.empty_like(student[i]) for i in stages]


def _loss_fake_by_device(student: list[Tensor], teacher: list[Tensor], pool_mode: Any, distance: Any, *rest: Any) -> tuple:
    """On CUDA tensors Triton's, which may keep less."""
    loss, gram_grads, gradients = _loss_fake(student, teacher, pool_mode, distance, *rest)
    if loss.device.type == "cuda":
        shapes = [kept_shape(student[i : i + 2], teacher[i : i + 2], distance) for i in range(len(gram_grads))]
        gram_grads = [loss.new_empty(shape) for shape in shapes]
    return loss, gram_grads, gradients


def _loss_backward_fake(
    grad: Tensor, features: list[Tensor], gram_grads: Any, pool_mode: Any, precision: Any, stages: list[int], *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(features[i]) for i in stages]


define("fsp_matrix(Tensor a, Tensor b, str pool_mode, str? precision) -> Tensor", _matrix_fake)
define(
    "fsp_matrix_backward(Tensor grad, Tensor a, Tensor b, str pool_mode, str? precision, bool a_grad, bool b_grad) -> Tensor[]",
    _matrix_backward_fake,
)
define(
    "fsp_loss(Tensor[] student, Tensor[] teacher, str pool_mode, str distance, str pair_reduce, float[]? weights, float weight, "
    "str? precision, bool with_grad, float? upstream=None, int[] stages=[]) -> (Tensor loss, Tensor[] gram_grads, Tensor[] gradients)",
    _loss_fake_by_device,
    _loss_fake,
)
define(
    "fsp_loss_backward(Tensor grad, Tensor[] features, Tensor[] gram_grads, str pool_mode, str? precision, int[] stages, bool negate, "
    "Tensor[]? others=None) -> Tensor[]",
    _loss_backward_fake,
)
differentiable_once("fsp_matrix_backward", "fsp_matrix")
differentiable_once("fsp_loss_backward", "fsp_loss")
flops.register()

_matrix = torch.ops.fastkd.fsp_matrix.default
_matrix_backward = torch.ops.fastkd.fsp_matrix_backward.default
_loss = torch.ops.fastkd.fsp_loss.default
_loss_backward = torch.ops.fastkd.fsp_loss_backward.default
_upstream = Upstream()


class FSPMatrixFunction(torch.autograd.Function):
    """``apply(a, b, pool_mode, precision)`` -> G = A B^T / S; dA = M B / S and dB = M^T A / S for an incoming M."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *options: Any) -> Tensor:
        return _matrix_forward(ctx, caller(a), a, b, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _factor_gradients(ctx, grad)


class _CudaFSPMatrixFunction(FSPMatrixFunction):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, *options: Any) -> Tensor:
        return _matrix_forward(ctx, in_cuda, a, b, *options)


def _matrix_forward(ctx: Any, run: Callable[..., Any], a: Tensor, b: Tensor, *options: Any) -> Tensor:
    # each factor is saved for the other's gradient, and may be an inference tensor only if that is not wanted
    ctx.save_for_backward(*((a, b) if any(ctx.needs_input_grad) else ()))
    ctx.options, ctx.call = options, run
    return run(_matrix, a, b, *options)


def _factor_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if backends.batched(grad):
        pool_mode, precision = ctx.options
        formula = functools.partial(reference.fsp_matrix, pool_mode=pool_mode, precision=precision)
        return *by_reference(formula, (a, b), needs, grad), None, None
    computed = iter(ctx.call(_matrix_backward, grad, a, b, *ctx.options, *needs))
    return next(computed) if needs[0] else None, next(computed) if needs[1] else None, None, None


def _traced_matrix_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


autograd("fsp_matrix", _factor_gradients, _traced_matrix_context)


class FSPLossFunction(torch.autograd.Function):
    """``apply(stages, options, *student, *teacher)`` -> loss.

    The forward saves M = dloss/dG of the student for each pair, for an upstream gradient of 1 (the teacher's is -M), so a chain's gradients
    need only the chain itself: dA = upstream M B / S, dB = upstream M^T A / S, and a middle stage adds the terms of its two pairs.
    Where M would be larger than the features, Triton keeps less and needs both chains' features of that pair (`kernels/gram_kept.py`).
    On a CPU, for the upstream gradient that is expected (:mod:`fastkd.ops._grad_prefetch`), it makes the student's gradients too, sample by
    sample, while the sample's maps are in the cache; the backward hands those out, once, if it is given just that.
    """

    @staticmethod
    def forward(ctx: Any, stages: int, options: tuple, *tensors: Tensor) -> Tensor:
        return _loss_forward(ctx, caller(tensors[0]), stages, options, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, and once: autograd looks for changes in place here, and hooks may load from elsewhere
        saved = ctx.saved_tensors
        made = dict(zip(ctx.made, take_prepared(ctx, grad, _upstream)))
        return None, None, *_chain_gradients(ctx, saved, grad, ctx.needs_input_grad[2:], made)


class _CudaFSPLossFunction(FSPLossFunction):
    @staticmethod
    def forward(ctx: Any, stages: int, options: tuple, *tensors: Tensor) -> Tensor:
        return _loss_forward(ctx, in_cuda, stages, options, tensors)


def _loss_forward(ctx: Any, run: Callable[..., Any], stages: int, options: tuple, tensors: tuple[Tensor, ...]) -> Tensor:
    needs = ctx.needs_input_grad[2:]
    wanted = [i for i in range(stages) if needs[i]]
    # a GPU's gradient must not be read by the host, and has no cache to wait in
    foreseeing = wanted and run is call and not hooked()
    ctx.situation, ctx.expected = _upstream.expect() if foreseeing else (None, None)
    made = wanted if ctx.expected is not None else []
    loss, gram_grads, gradients = run(_loss, list(tensors[:stages]), list(tensors[stages:]), *options, any(needs), ctx.expected, made)
    wide = wide_stages(gram_grads)
    saved: list[Tensor | None] = [None] * len(tensors)
    ctx.frozen = {}
    for first in (0, stages):
        for i in range(stages) if any(needs[first : first + stages]) else wide:
            # what was made under inference_mode, a teacher, cannot be saved, nor changed in place
            if tensors[first + i].is_inference():
                ctx.frozen[first + i] = tensors[first + i]
            else:
                saved[first + i] = tensors[first + i]
    ctx.save_for_backward(*gram_grads, *saved)
    ctx.call, ctx.stages, ctx.options = run, stages, options
    ctx.made, ctx.prepared = made, gradients
    return loss


def _chain_gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], made: dict[int, Tensor] | None = None
) -> list[Tensor | None]:
    """The gradients of student and teacher features, None where ``needs`` says so; ``made`` holds those of student stages that exist."""
    stages, (pool_mode, *_, precision) = ctx.stages, ctx.options
    gram_grads, features = list(saved[: stages - 1]), list(saved[stages - 1 :])
    for i, x in ctx.frozen.items():
        features[i] = x
    run = one_for_all(ctx.call) if backends.batched(grad) else ctx.call
    wide, made = wide_stages(gram_grads), made or {}
    out: list[Tensor | None] = [made.get(i) if needs[i] else None for i in range(stages)] + [None] * stages
    for first in (0, stages):
        wanted = [i for i in range(stages) if needs[first + i] and out[first + i] is None]
        if wanted:
            chain, others = features[first : first + stages], [features[stages - first + i] for i in wide] or None
            computed = run(_loss_backward, grad, chain, gram_grads, pool_mode, precision, wanted, first > 0, others)
            for i, dx in zip(wanted, computed, strict=True):
                out[first + i] = dx
    return out


def _traced_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    student, teacher, *options, with_grad, _, _ = inputs
    ctx.mark_non_differentiable(*output[1], *output[2])
    ctx.save_for_backward(*output[1], *student, *teacher)
    ctx.stages, ctx.options, ctx.frozen, ctx.with_grad = len(student), options, {}, with_grad


def _traced_loss_backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple:
    if not ctx.with_grad:
        raise RuntimeError("fastkd::fsp_loss was called with with_grad=False for a tensor that needs a gradient")
    student_needs, teacher_needs = ctx.needs_input_grad[:2]
    out = _chain_gradients(ctx, ctx.saved_tensors, grad, [*student_needs, *teacher_needs])
    # PyTorch 2.11 drops arguments that have their default values, and wants no gradient of those
    return out[: ctx.stages], out[ctx.stages :], *(None for _ in ctx.needs_input_grad[2:])


autograd("fsp_loss", _traced_loss_backward, _traced_loss_context)


def fsp_matrix(a: Tensor, b: Tensor, *, pool_mode: str = "avg", precision: str | None = None) -> Tensor:
    """FSP matrix: the Gram matrix between the channels of two features, averaged over positions.

    Args:
        a: (N, Ca, *Sa), b: (N, Cb, *Sb), one to three spatial dimensions, float16, bfloat16, float32 or float64, any dtypes and strides.
        pool_mode: where spatial sizes differ, both are pooled (adaptively, "avg" or "max") to the smaller size in each dimension.
        precision: of the products on a GPU: "ieee", "tf32", "tf32x3", or None for PyTorch's own setting; ignored on a CPU.

    Returns: (N, Ca, Cb), float32 (float64 if any input is float64); differentiable in both.
    Equals ``torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)) / S`` at equal sizes.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Yim et al., *A gift from knowledge distillation*, CVPR 2017.
    """
    backend = backends.choose("fsp_matrix", (a, b), lambda: "")
    if backend == "reference":
        return reference.fsp_matrix(a, b, pool_mode=pool_mode, precision=precision)
    if backend == "cuda":
        precision = precision or kernels.own_precision()
    if torch.compiler.is_compiling():
        checks.fsp_matrix(a, b, pool_mode, precision)
        return traced(backend, _matrix)(a, b, pool_mode, precision)
    try:
        return (_CudaFSPMatrixFunction if backend == "cuda" else FSPMatrixFunction).apply(a, b, pool_mode, precision)
    except Exception:
        checks.fsp_matrix(a, b, pool_mode, precision)
        raise


def fsp_loss(
    student: Features,
    teacher: Features,
    *,
    pool_mode: str = "avg",
    distance: str = "squared",
    pair_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """FSP loss: the distance of student and teacher FSP matrices over consecutive stages, in one call.

    Args:
        student, teacher: L >= 2 features (N, C, *S), equal channels stage by stage; the L - 1 consecutive ones are pairs. A list, a
            tuple, a dict (its values) or a generator, in its order.
        pool_mode, precision: as in :func:`fsp_matrix`; student and teacher pool each for itself.
        distance: "squared", the mean over N, Ca and Cb of the squared difference; "frobenius", the mean over N of the squared Frobenius
            norm; "column_l2", the mean over N of the summed l2 norms of the columns (index Cb).
        pair_reduce, weights: "sum" or "mean" of the pairs' terms, each multiplied by its weight.
        weight: multiplies the loss, in float32, before a half-precision gradient is rounded.

    Returns: a scalar, float32 (float64 if any input is float64); differentiable in student and teacher.
    Equals ``weight * sum((fsp_matrix(*s) - fsp_matrix(*t)).square().mean() for s, t in zip(pairwise(student), pairwise(teacher)))`` at
    the defaults, with :func:`itertools.pairwise`.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Yim et al., *A gift from knowledge distillation*, CVPR 2017, and its published implementations (see the presets).
    """
    student, teacher = checks.listed(student), checks.listed(teacher)
    backend = backends.choose("fsp_loss", (student, teacher), lambda: backends.why_not_cuda_chain(student))
    if backend == "reference":
        return reference.fsp_loss(
            student, teacher, pool_mode=pool_mode, distance=distance, pair_reduce=pair_reduce, weights=weights, weight=weight,
            precision=precision,
        )  # fmt: skip
    if backend == "cuda":
        precision = precision or kernels.own_precision()
    if not checks.are_floats(weight):
        weight = checks.number("weight", weight)
    weights = checks.stage_weights(weights, what="pair", convert=checks.constant)
    options = (pool_mode, distance, pair_reduce, weights, weight, precision)
    if torch.compiler.is_compiling():
        # the weight has been looked at, and may be a number that only the graph knows
        students, teachers = checks.fsp_loss(student, teacher, *options[:4], 1.0, precision)
        needs = torch.is_grad_enabled() and any(x.requires_grad for x in students + teachers)
        # the weight outside: a number among an operator's arguments is a constant of the graph
        return traced(backend, _loss)(students, teachers, *options[:4], 1.0, precision, needs)[0] * weight
    try:
        students, teachers = checks.stages("student", student), checks.stages("teacher", teacher)
        if not recorded(students) and not recorded(teachers):
            return call_unrecorded(backend, students[0], _loss, students, teachers, *options, False, None, [])[0]
        return (_CudaFSPLossFunction if backend == "cuda" else FSPLossFunction).apply(len(students), options, *students, *teachers)
    except Exception:
        checks.fsp_loss(student, teacher, *options)
        raise
