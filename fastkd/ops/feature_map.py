"""The taps: a feature's attention map taken on its way through the network, so that the backward pass adds the map's gradient to the
incoming one in a pass that is made anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd.ops._register import accumulator, autograd, by_reference, caller, define, differentiable_once, in_cuda, one_device, traced

_OPTIONS = "float p, str channel_reduce, bool signed, float eps, str eps_mode"


def _backward_fake(grad: Tensor | None, map_grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _relu_fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    one_device([x] if residual is None else [x, residual])
    dtype = accumulator([x])
    return torch.empty_like(x), x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype), x.new_empty((x.shape[0],), dtype=dtype)


# the forward of tap is fastkd::attention_map: an operator may not hand its own input back
define(f"tap_backward(Tensor? grad, Tensor map_grad, Tensor x, Tensor map, Tensor norm, {_OPTIONS}) -> Tensor", _backward_fake)
define(f"relu_tap(Tensor x, Tensor? residual, {_OPTIONS}) -> (Tensor y, Tensor map, Tensor norm)", _relu_fake)
define(f"relu_tap_backward(Tensor? grad, Tensor map_grad, Tensor y, Tensor map, Tensor norm, {_OPTIONS}) -> Tensor", _backward_fake)
differentiable_once("tap_backward", "tap")
differentiable_once("relu_tap_backward", "relu_tap")

_map = torch.ops.fastkd.attention_map.default
_backward = torch.ops.fastkd.tap_backward.default
_relu = torch.ops.fastkd.relu_tap.default
_relu_backward = torch.ops.fastkd.relu_tap_backward.default


_EMPTY = torch.empty(0)


def _watch(ctx: Any, x: Tensor) -> None:
    """Note how often x was changed in place so far. What watches it shares x's counter of changes, but none of its memory."""
    ctx.watched, ctx.version = None, 0
    if any(ctx.needs_input_grad):
        ctx.watched = x.detach()
        ctx.watched.data = _EMPTY
        ctx.version = ctx.watched._version


def _unchanged(ctx: Any, sentence: str) -> None:
    # PyTorch's own check says neither whose feature it was nor what to do, and does not see it where hooks keep the saved tensors
    if ctx.watched is not None and ctx.watched._version != ctx.version:
        raise RuntimeError(f"{sentence} before the backward pass, which needs it as it was")


class TapFunction(torch.autograd.Function):
    """``apply(x, p, channel_reduce, signed, eps, eps_mode)`` -> x, map.

    dx = g + k sign(x) |x|^(p-1) for the incoming gradient g of x and the coefficient k = p dq (/ C for "mean") of each position, with dq
    as in :class:`fastkd.ops.attention.AttentionMapFunction`; the sum is formed in float32 and rounded once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, channel_reduce: str, signed: bool, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
        return _tap_forward(ctx, caller(x), x, p, channel_reduce, signed, eps, eps_mode)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, map_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _unchanged(ctx, "tap's feature was modified inplace, by a ReLU for which relu_tap stands or by another operation,")
        if map_grad is not None:
            x, attention, norm = ctx.saved_tensors
            if backends.batched(grad, map_grad):
                grad = _sum_in_pytorch(ctx, grad, map_grad, x)
            else:
                grad = ctx.call(_backward, grad, map_grad, x, attention, norm, *ctx.options)
        return grad, None, None, None, None, None


class _CudaTapFunction(TapFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, channel_reduce: str, signed: bool, eps: float, eps_mode: str) -> tuple[Tensor, Tensor]:
        return _tap_forward(ctx, in_cuda, x, p, channel_reduce, signed, eps, eps_mode)


def _tap_forward(
    ctx: Any, run: Callable[..., Any], x: Tensor, p: float, channel_reduce: str, signed: bool, eps: float, eps_mode: str
) -> tuple[Tensor, Tensor]:
    y, norm = run(_map, x, p, channel_reduce, signed, True, eps, eps_mode)
    ctx.save_for_backward(x, y, norm)
    ctx.set_materialize_grads(False)
    ctx.call, ctx.options = run, (p, channel_reduce, signed, eps, eps_mode)
    _watch(ctx, x)
    return x.detach(), y  # x itself would be handed back as a view, whose change autograd refuses without saying what to do


def _sum_in_pytorch(ctx: Any, grad: Tensor | None, map_grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` and the gradient that ``map_grad`` gives x, where these stand for several each."""
    p, channel_reduce, signed, eps, eps_mode = ctx.options
    options = dict(p=p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)
    dx: Any = by_reference(functools.partial(reference.attention_map, **options), [x], [True], map_grad)[0]
    return dx if grad is None else grad + dx


class ReluTapFunction(torch.autograd.Function):
    """``apply(x, residual, p, channel_reduce, signed, eps, eps_mode)`` -> y = relu(x + residual), map of y.

    dx = (g + k y^(p-1)) where y > 0, else 0, for x and residual alike; g and k as in :class:`TapFunction`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return _relu_forward(ctx, caller(x), x, residual, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, map_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _relu_gradients(ctx, grad, map_grad)


class _CudaReluTapFunction(ReluTapFunction):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return _relu_forward(ctx, in_cuda, x, residual, *options)


def _relu_forward(ctx: Any, run: Callable[..., Any], x: Tensor, residual: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    y, attention, norm = run(_relu, x, residual, *options)
    ctx.save_for_backward(y, attention, norm)
    ctx.set_materialize_grads(False)
    ctx.call, ctx.options = run, options
    _watch(ctx, y)
    return y, attention


def _relu_gradients(ctx: Any, grad: Tensor | None, map_grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    _unchanged(ctx, "relu_tap's feature was modified by an inplace operation")
    y, attention, norm = ctx.saved_tensors
    if map_grad is not None and backends.batched(grad, map_grad):
        grad = _sum_in_pytorch(ctx, grad, map_grad, y) * (y > 0)
    elif map_grad is not None:
        grad = ctx.call(_relu_backward, grad, map_grad, y, attention, norm, *ctx.options)
    elif grad is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return *(grad if need else None for need in ctx.needs_input_grad[:2]), *(None for _ in ctx.options)


def _traced_relu_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.watched = None
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[2])
    ctx.options = inputs[2:]


autograd("relu_tap", _relu_gradients, _traced_relu_context)


def tap(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """A feature and its attention map, as one differentiable operation: the network goes on with the first, a loss takes the second.

    The backward pass adds the map's gradient to the one that arrives from the network in a single pass over the feature, so that no
    gradient of the loss is written, read again and added. Give the map to :func:`attention_transfer_loss` with ``student_is_map=True``.
    Use what is returned in place of x: where x itself goes on, autograd adds as ever. The feature returned shares x's memory and may not
    be changed in place, which the backward pass refuses: before a ReLU take :func:`relu_tap`. Inside ``torch.compile`` it is
    ``x, attention_map(x)``.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        p, channel_reduce, signed, eps, eps_mode: as in :func:`attention_map`.

    Returns: x, without a copy, and its normalized map (N, *S), float32 (float64 for a float64 x).
    Equals ``(x, attention_map(x))``; x's gradient is summed in float32 and rounded once.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    backend = backends.choose("tap", (x,), lambda: backends.why_not_cuda_map(p))
    if backend == "reference":
        return reference.tap(x, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    if torch.compiler.is_compiling():
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        return x, traced(backend, _map)(x, p, channel_reduce, signed, True, eps, eps_mode)[0]
    try:
        return (_CudaTapFunction if backend == "cuda" else TapFunction).apply(x, p, channel_reduce, signed, eps, eps_mode)
    except Exception:
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        raise


def relu_tap(
    x: Tensor,
    residual: Tensor | None = None,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """The ReLU that ends a stage, the addition before it and the attention map of the result, as one differentiable operation.

    The forward pass takes the map's energies while it writes y, the backward pass adds the map's gradient while it applies the ReLU's:
    attention transfer then costs no pass over the feature of its own. y is kept for the backward pass and may not be changed in place.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        residual: None, or a tensor of x's shape and dtype that is added first.
        p, channel_reduce, signed, eps, eps_mode: of the map, as in :func:`attention_map`.

    Returns: y = relu(x + residual), of x's dtype and strides, and the normalized map (N, *S) of y as rounded, float32 (float64 for a
    float64 x). x and residual get the same gradient; it is summed in float32 and rounded once.
    Equals ``y = torch.relu(x + residual); (y, attention_map(y))``.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    backend = backends.choose("relu_tap", (x, residual), lambda: backends.why_not_cuda_map(p))
    if backend == "reference":
        return reference.relu_tap(x, residual, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    options = (p, channel_reduce, signed, eps, eps_mode)
    if torch.compiler.is_compiling():
        checks.relu_tap(x, residual, p, channel_reduce, eps, eps_mode)
        return traced(backend, _relu)(x, residual, *options)[:2]
    try:
        return (_CudaReluTapFunction if backend == "cuda" else ReluTapFunction).apply(x, residual, *options)
    except Exception:
        checks.relu_tap(x, residual, p, channel_reduce, eps, eps_mode)
        raise
