"""FSP (flow of solution procedure) matrices: operators, autograd rules, public function."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, kernels, reference
from fastkd._bits import FSP
from fastkd._implementations import Backend
from fastkd._private import batched, few_frames
from fastkd.ops import _batched_grads, _cuda_limits
from fastkd.ops._register import autograd, define, differentiable_once, one_device
from fastkd.reference.common import accumulator

_A_GRAD, _B_GRAD = FSP.bits("a_grad"), FSP.bits("b_grad")


def _matrix_fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    one_device([a, b])
    return a.new_empty((a.shape[0], a.shape[1], b.shape[1]), dtype=accumulator([a, b]))


def _matrix_backward_fake(grad: Tensor, a: Tensor, b: Tensor, options: int) -> list[Tensor]:
    return [torch.empty_like(x) for x, bit in ((a, _A_GRAD), (b, _B_GRAD)) if options & bit]


define("fsp_matrix(Tensor a, Tensor b, int options) -> Tensor", _matrix_fake)
define("fsp_matrix_backward(Tensor grad, Tensor a, Tensor b, int options) -> Tensor[]", _matrix_backward_fake)
differentiable_once("fsp_matrix_backward")


@few_frames
class FSPMatrixFunction(torch.autograd.Function):
    """``apply(impl, options, a, b)`` -> G = A B^T / S; dA = M B / S and dB = M^T A / S for an incoming M."""

    @staticmethod
    def forward(ctx: Any, impl: Backend, options: int, a: Tensor, b: Tensor) -> Tensor:
        # each factor is saved for the other's gradient, and may be an inference tensor only if that is not
        # wanted
        ctx.save_for_backward(*((a, b) if any(ctx.needs_input_grad) else ()))
        ctx.impl, ctx.options = impl, options
        return impl.run("fsp_matrix", a, b, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_factor_gradients(ctx, grad, ctx.needs_input_grad[2:])


def _factor_gradients(ctx: Any, grad: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    a, b = ctx.saved_tensors
    options = ctx.options
    if batched(grad):
        how = {name: FSP.value(options, name) for name in ("pool_mode", "precision")}
        formula = functools.partial(reference.fsp_matrix, **how)
        return _batched_grads.by_reference(formula, (a, b), needs, grad)
    for need, bit in zip(needs, (_A_GRAD, _B_GRAD), strict=True):
        options |= bit if need else 0
    computed = iter(ctx.impl.run_backward("fsp_matrix_backward", grad, a, b, options))
    return [next(computed) if need else None for need in needs]


def _graph_matrix_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *factors, ctx.options = inputs
    ctx.save_for_backward(*factors)


def _graph_matrix_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_factor_gradients(ctx, grad, ctx.needs_input_grad[:2]), None


autograd("fsp_matrix", _graph_matrix_backward, _graph_matrix_context)


def fsp_matrix(
    a: Tensor, b: Tensor, *, pool_mode: str = "avg", precision: str | None = None, channel_dim: int = 1
) -> Tensor:
    """FSP matrix: the Gram matrix between the channels of two features, averaged over positions.

    Args:
        a: (N, Ca, *Sa), b: (N, Cb, *Sb), one to three spatial dimensions, float16, bfloat16, float32 or
            float64, any dtypes and strides.
        pool_mode: where spatial sizes differ, both are pooled (adaptively, "avg" or "max") to the smaller
            size in each dimension.
        precision: of the products on a GPU: "ieee", "tf32", "tf32x3", or None for PyTorch's own setting;
            ignored on a CPU.
        channel_dim: where C stands: 1, or -1 for views (N, *S, C) and tokens (N, L, C), without a copy.

    Returns: (N, Ca, Cb), float32 (float64 if any input is float64); differentiable in both.
    Equals ``torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)) / S`` at equal sizes.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Yim et al., *A gift from knowledge distillation*, CVPR 2017.
    """
    if channel_dim != 1 or type(channel_dim) is not int:
        a, b = checks.channels_second((a, b), channel_dim)
    impl = backends.select("fsp_matrix", (a, b), _cuda_limits.none)
    if impl.name == "reference":
        return reference.fsp_matrix(a, b, pool_mode=pool_mode, precision=precision)
    checks.switch("pool_mode", pool_mode, checks.POOL_MODE)
    checks.switch("precision", precision, checks.PRECISION)
    if impl.name == "cuda":
        precision = precision or kernels.own_precision()
    options = FSP.pack(pool_mode=pool_mode, precision=precision)
    if torch.compiler.is_compiling():
        checks.fsp_matrix(a, b, pool_mode, precision)
        return impl.graph_op("fsp_matrix")(a, b, options)
    try:
        return FSPMatrixFunction.apply(impl, options, a, b)
    except Exception:
        checks.explain(checks.fsp_matrix, a, b, pool_mode, precision)
        raise
