"""The FSP loss of chains of features: autograd rules, public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, kernels, reference
from fastkd._implementations import Backend
from fastkd._private import batched, few_frames, saved_tensors_hooked
from fastkd.checks import Features
from fastkd.kernels.fsp.saved import wide_stages
from fastkd.ops import _batched_grads, _cuda_limits, _grad_prefetch, flops
from fastkd.ops._fsp_operators import NEGATE, PREPARE, TEACHER_GRAD, WITH_GRAD, apart
from fastkd.ops._options import FSPOptions, OperatorOptions, fsp_options
from fastkd.ops._register import autograd, wanting_gradients
from fastkd.ops.fsp_matrix import FSPMatrixFunction as FSPMatrixFunction
from fastkd.ops.fsp_matrix import fsp_matrix as fsp_matrix

flops.register()

_prefetch = _grad_prefetch.GradPrefetch()


@few_frames
class FSPLossFunction(torch.autograd.Function):
    """``apply((impl, options, student, teacher, needed), *tensors)`` -> loss, for lists of features of which
    ``tensors`` need a gradient.

    ``needed``: the places of those in ``[*student, *teacher]``. The forward saves M = dloss/dG of the student
    for each pair, for an upstream gradient of 1 (the teacher's is -M), so a chain's gradients need only the
    chain itself: dA = upstream M B / S, dB = upstream M^T A / S, and a middle stage adds the terms of its two
    pairs. Where M would be larger than the features, or slower than products over channels, Triton and the
    C++ kernels keep less and need both chains' features of that pair (`kernels/fsp/saved.py`). On a CPU, for
    the upstream gradient that is expected (:mod:`fastkd.ops._grad_prefetch`), it makes the gradients of a
    student that needs all of them too, sample by sample, while the sample's maps are in the cache; the
    backward hands those out, once, if it is given just that.
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
        if student[0].dim() == 3:
            checks.tokens("fsp_loss", student, teacher)
        options |= WITH_GRAD if needed[-1] < stages else WITH_GRAD | TEACHER_GRAD
        upstream, ctx.expected = None, None
        whole = len(needed) >= stages and needed[stages - 1] == stages - 1
        if whole and impl.prefetches and not saved_tensors_hooked():
            ctx.expected = _prefetch.expect()
            upstream = ctx.expected[1]
        if upstream is None:
            upstream = 0.0
        else:
            options |= PREPARE
        loss, matrix_grads, ctx.prepared = impl.run(
            "fsp_loss", student, teacher, options, [upstream, *numbers]
        )
        common = len(needed) == stages == needed[-1] + 1  # the student's gradients alone
        if common and all(x.dim() in (1, 3) for x in matrix_grads):
            places, frozen = needed, dict[int, Tensor]()
            ctx.save_for_backward(*matrix_grads, *tensors)
        else:
            places, frozen = _save_chains(ctx, student, teacher, needed, matrix_grads)
        ctx.call = impl, options, stages, needed, places, frozen, len(matrix_grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # first, and once: autograd looks for changes in place here, and hooks may load from elsewhere
        saved = ctx.saved_tensors
        prepared = _grad_prefetch.take(ctx, grad, _prefetch)
        needed = ctx.call[3]
        if len(prepared) == len(needed) == needed[-1] + 1:  # the student's, as is common
            return None, *prepared
        made = {i: prepared[i] for i in needed if i < len(prepared)}
        return None, *_chain_gradients(ctx, saved, grad, ctx.needs_input_grad[1:], made)


def _save_chains(
    ctx: Any,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    needed: Sequence[int],
    matrix_grads: Sequence[Tensor],
) -> tuple[list[int], dict[int, Tensor]]:
    """Save the features of the chains that need a gradient, and those of both where M is not saved. Returns
    the places of those that were saved, and by their place those that cannot be.
    """
    stages, wide, every = len(student), wide_stages(apart(matrix_grads, student)), (*student, *teacher)
    places = []
    for first, need in ((0, needed[0] < stages), (stages, needed[-1] >= stages)):
        places += [first + i for i in (range(stages) if need else wide)]
    # what was made under inference_mode, a teacher, cannot be saved, nor changed in place
    frozen = {i: every[i] for i in places if every[i].is_inference()}
    places = [i for i in places if i not in frozen]
    ctx.save_for_backward(*matrix_grads, *[every[i] for i in places])
    return places, frozen


def _chain_gradients(
    ctx: Any, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], made: dict[int, Tensor]
) -> list[Tensor | None]:
    """The gradients of the features that need one, None where ``needs`` says so; ``made`` holds those that
    exist, by their place.
    """
    impl, options, stages, needed, places, frozen, count = ctx.call
    by_place = dict(zip(places, saved[count:])) | frozen
    features = [by_place.get(i) for i in range(2 * stages)]
    matrix_grads = apart(saved[:count], features[:stages])
    wide = wide_stages(matrix_grads)
    run = functools.partial(_batched_grads.scaled, impl) if batched(grad) else impl.run_backward
    found = {place: made.get(place) for place, need in zip(needed, needs) if need}
    for first, sign in ((0, 0), (stages, NEGATE)):
        left = [
            place - first for place, dx in found.items() if dx is None and first <= place < first + stages
        ]
        if left:
            chain, others = features[first : first + stages], [features[stages - first + i] for i in wide]
            computed = run("fsp_loss_backward", grad, chain, matrix_grads, options | sign, left, others)
            found.update(zip([first + i for i in left], computed, strict=True))
    return [found.get(place) for place in needed]


def _graph_loss_context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    student, teacher, options, _ = inputs
    ctx.mark_non_differentiable(*output[1], *output[2])
    ctx.save_for_backward(*output[1], *student, *teacher)
    places = range(2 * len(student))
    ctx.call = ctx.impl, options, len(student), places, places, {}, len(output[1])


def _graph_loss_backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple:
    _, options, stages, *_ = ctx.call
    if not options & WITH_GRAD:
        raise RuntimeError(
            "fastkd::fsp_loss was called with with_grad=False for a tensor that needs a gradient"
        )
    student_needs, teacher_needs = ctx.needs_input_grad[:2]
    out = _chain_gradients(ctx, ctx.saved_tensors, grad, [*student_needs, *teacher_needs], {})
    return out[:stages], out[stages:], None, None


autograd("fsp_loss", _graph_loss_backward, _graph_loss_context)


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
    channel_dim: int = 1,
) -> Tensor:
    """FSP loss: the distance of student and teacher FSP matrices over consecutive stages, in one call.

    Args:
        student, teacher: L >= 2 features (N, C, *S), equal channels stage by stage; the L - 1 consecutive
            ones are pairs. A list, a tuple, a dict (its values) or a generator, in its order.
        pool_mode, precision: as in :func:`fsp_matrix`; student and teacher pool each for itself.
        distance: "squared", the mean over N, Ca and Cb of the squared difference; "frobenius", the mean over
            N of the squared Frobenius norm; "column_l2", the mean over N of the summed l2 norms of the
            columns (index Cb).
        pair_reduce, weights: "sum" or "mean" of the pairs' terms, each multiplied by its weight.
        weight: multiplies the loss, in float32, before a half-precision gradient is rounded.
        channel_dim: as in :func:`fsp_matrix`.

    Returns: a scalar, float32 (float64 if any input is float64); differentiable in student and teacher.
    Equals ``weight * sum((fsp_matrix(*s) - fsp_matrix(*t)).square().mean() for s, t in zip(pairwise(student),
    pairwise(teacher)))`` at the defaults, with :func:`itertools.pairwise`.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Yim et al., *A gift from knowledge distillation*, CVPR 2017, and its published implementations
    (see the presets).
    """
    student, teacher = checks.listed(student), checks.listed(teacher)
    if channel_dim != 1 or type(channel_dim) is not int:
        student, teacher = (checks.channels_second(side, channel_dim) for side in (student, teacher))
    impl = backends.select("fsp_loss", (student, teacher), _cuda_limits.fsp_loss)
    if impl.name == "reference":
        return reference.fsp_loss(
            student,
            teacher,
            pool_mode=pool_mode,
            distance=distance,
            pair_reduce=pair_reduce,
            weights=weights,
            weight=weight,
            precision=precision,
        )
    if impl.name == "cuda":
        precision = precision or kernels.own_precision()
    given = (pool_mode, distance, pair_reduce, weights, weight, precision)
    if torch.compiler.is_compiling():
        return _loss_in_graph(impl, student, teacher, FSPOptions(*given))
    try:
        options = fsp_options(given)
        students, teachers = checks.stages("student", student), checks.stages("teacher", teacher)
        needed, tensors = wanting_gradients(students, teachers)
        if tensors:
            return FSPLossFunction.apply((impl, options, students, teachers, needed), *tensors)
        bits, numbers = options
        return impl.run("fsp_loss", students, teachers, bits, [0.0, *numbers])[0]
    except Exception:
        checks.explain(checks.fsp_loss, student, teacher, *given)
        raise


def _loss_in_graph(impl: Backend, student: Features, teacher: Features, given: FSPOptions) -> Tensor:
    options, (weight, *weights) = given.validated()
    # the weight has been looked at, and may be a number that only the graph knows
    students, teachers = checks.fsp_loss(student, teacher, *given._replace(weight=1.0))
    if torch.is_grad_enabled() and any(x.requires_grad for x in students + teachers):
        # the matrix, as for a teacher that learns: products over channels would want the teacher's features
        # saved, and a graph cannot save those of inference mode
        options |= WITH_GRAD | TEACHER_GRAD
    # the weight outside: a number among an operator's arguments is a constant of the graph
    return impl.graph_op("fsp_loss")(students, teachers, options, [0.0, 1.0, *weights])[0] * weight
