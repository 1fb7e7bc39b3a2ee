"""The taps: a feature's attention map taken on its way through the network, so that the backward pass adds
the map's gradient to the incoming one in a pass that is made anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import Backend
from fastkd._private import batched, few_frames, version
from fastkd.ops import _batched_grads, _cuda_limits
from fastkd.ops._register import autograd, define, differentiable_once, one_device
from fastkd.reference.common import accumulator

_OPTIONS = "float p, str channel_reduce, bool signed, float eps, str eps_mode"


def _backward_fake(grad: Tensor | None, map_grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _relu_fake(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    one_device([x] if residual is None else [x, residual])
    dtype = accumulator([x])
    return (
        torch.empty_like(x),
        x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype),
        x.new_empty((x.shape[0],), dtype=dtype),
    )


# the forward of tap is fastkd::attention_map: an operator may not hand its own input back
define(
    f"tap_backward(Tensor? grad, Tensor map_grad, Tensor x, Tensor map, Tensor norm, {_OPTIONS}) -> Tensor",
    _backward_fake,
)
define(f"relu_tap(Tensor x, Tensor? residual, {_OPTIONS}) -> (Tensor y, Tensor map, Tensor norm)", _relu_fake)
define(
    f"relu_tap_backward(Tensor? grad, Tensor map_grad, Tensor y, Tensor map, Tensor norm, {_OPTIONS}) ->"
    " Tensor",
    _backward_fake,
)
differentiable_once("tap_backward")
differentiable_once("relu_tap_backward")

_EMPTY = torch.empty(0)


def _watch(ctx: Any, x: Tensor) -> None:
    """Note x's version counter, which counts changes in place. ``ctx.watched`` shares the counter with x, but
    not its memory.
    """
    ctx.watched, ctx.version = None, 0
    if any(ctx.needs_input_grad):
        ctx.watched = x.detach()
        ctx.watched.data = _EMPTY
        ctx.version = version(ctx.watched)


def _unchanged(ctx: Any, sentence: str) -> None:
    # PyTorch's own check says neither whose feature it was nor what to do, and does not see it where hooks
    # keep the saved tensors
    if ctx.watched is not None and version(ctx.watched) != ctx.version:
        raise RuntimeError(f"{sentence} before the backward pass, which needs it as it was")


@few_frames
class TapFunction(torch.autograd.Function):
    """``apply(impl, x, p, channel_reduce, signed, eps, eps_mode)`` -> x, map.

    dx = g + k sign(x) |x|^(p-1) for the incoming gradient g of x and the coefficient k = p dq (/ C for
    "mean") of each position, with dq as in :class:`fastkd.ops.attention_map.AttentionMapFunction`; the sum is
    formed in float32 and rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        impl: Backend,
        x: Tensor,
        p: float,
        channel_reduce: str,
        signed: bool,
        eps: float,
        eps_mode: str,
    ) -> tuple[Tensor, Tensor]:
        y, norm = impl.run("attention_map", x, p, channel_reduce, signed, True, eps, eps_mode)
        ctx.save_for_backward(x, y, norm)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.options = impl, (p, channel_reduce, signed, eps, eps_mode)
        _watch(ctx, x)
        # x itself would be handed back as a view, whose change autograd refuses without saying what to do
        return x.detach(), y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, map_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        _unchanged(
            ctx,
            "tap's feature was modified inplace, by a ReLU for which relu_tap stands or by another"
            " operation,",
        )
        if map_grad is not None:
            x, attention, norm = ctx.saved_tensors
            if batched(grad, map_grad):
                grad = _sum_in_pytorch(ctx, grad, map_grad, x)
            else:
                grad = ctx.impl.run_backward("tap_backward", grad, map_grad, x, attention, norm, *ctx.options)
        return None, grad, None, None, None, None, None


def _sum_in_pytorch(ctx: Any, grad: Tensor | None, map_grad: Tensor, x: Tensor) -> Tensor:
    """``grad`` plus the gradient that ``map_grad`` gives x, for batches of gradients."""
    p, channel_reduce, signed, eps, eps_mode = ctx.options
    options = dict(p=p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)
    dx: Any = _batched_grads.by_reference(
        functools.partial(reference.attention_map, **options), [x], [True], map_grad
    )[0]
    return dx if grad is None else grad + dx


@few_frames
class ReluTapFunction(torch.autograd.Function):
    """``apply(impl, x, residual, p, channel_reduce, signed, eps, eps_mode)`` -> y = relu(x + residual), map
    of y.

    dx = (g + k y^(p-1)) where y > 0, else 0, for x and residual alike; g and k as in :class:`TapFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: Backend, x: Tensor, residual: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        y, attention, norm = impl.run("relu_tap", x, residual, *options)
        ctx.save_for_backward(y, attention, norm)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.options = impl, options
        _watch(ctx, y)
        return y, attention

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, map_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        dx = _relu_gradient(ctx, grad, map_grad)
        return (
            None,
            *(dx if need else None for need in ctx.needs_input_grad[1:3]),
            *(None for _ in ctx.options),
        )


def _relu_gradient(ctx: Any, grad: Tensor | None, map_grad: Tensor | None) -> Tensor | None:
    """The gradient of x and residual alike."""
    _unchanged(ctx, "relu_tap's feature was modified by an inplace operation")
    y, attention, norm = ctx.saved_tensors
    if map_grad is None:
        return None if grad is None else torch.ops.aten.threshold_backward(grad, y, 0)
    if batched(grad, map_grad):
        return _sum_in_pytorch(ctx, grad, map_grad, y) * (y > 0)
    return ctx.impl.run_backward("relu_tap_backward", grad, map_grad, y, attention, norm, *ctx.options)


def _graph_relu_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.watched = None
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(output[2])
    ctx.options = inputs[2:]


def _graph_relu_backward(
    ctx: Any, grad: Tensor | None, map_grad: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    dx = _relu_gradient(ctx, grad, map_grad)
    return *(dx if need else None for need in ctx.needs_input_grad[:2]), *(None for _ in ctx.options)


autograd("relu_tap", _graph_relu_backward, _graph_relu_context)


def tap(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """A feature and its attention map, as one differentiable operation: the network goes on with the first, a
    loss takes the second.

    The backward pass adds the map's gradient to the one that arrives from the network in a single pass over
    the feature, so that no gradient of the loss is written, read again and added. Give the map to
    :func:`attention_transfer_loss` with ``student_is_map=True``. Use what is returned in place of x: where x
    itself goes on, autograd adds as usual. The feature returned shares x's memory and may not be changed in
    place, which the backward pass refuses: before a ReLU take :func:`relu_tap`. Inside ``torch.compile`` it
    is ``x, attention_map(x)``.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        p, channel_reduce, signed, eps, eps_mode: as in :func:`attention_map`.

    Returns: x, without a copy, and its normalized map (N, *S), float32 (float64 for a float64 x).
    Equals ``(x, attention_map(x))``; x's gradient is summed in float32 and rounded once.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    impl = backends.select("tap", (x,), _cuda_limits.attention_map, (p,))
    if impl.name == "reference":
        return reference.tap(x, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    if torch.compiler.is_compiling():
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        return x, impl.graph_op("attention_map")(x, p, channel_reduce, signed, True, eps, eps_mode)[0]
    try:
        return TapFunction.apply(impl, x, p, channel_reduce, signed, eps, eps_mode)
    except Exception:
        checks.explain(checks.attention_map, x, p, channel_reduce, eps, eps_mode)
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
    """The ReLU that ends a stage, the addition before it and the attention map of the result, as one
    differentiable operation.

    The forward pass takes the map's channel power sums while it writes y. The backward pass adds
    the map's gradient while it applies the ReLU's. Attention transfer then costs no pass over the feature of
    its own. y is saved for the backward pass and may not be changed in place.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        residual: None, or a tensor of x's shape and dtype that is added first.
        p, channel_reduce, signed, eps, eps_mode: of the map, as in :func:`attention_map`.

    Returns: y = relu(x + residual), of x's dtype and strides, and the normalized map (N, *S) of y as rounded,
    float32 (float64 for a float64 x). x and residual get the same gradient; it is summed in float32 and
    rounded once.
    Equals ``y = torch.relu(x + residual); (y, attention_map(y))``.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    impl = backends.select("relu_tap", (x, residual), _cuda_limits.attention_map, (p,))
    if impl.name == "reference":
        return reference.relu_tap(
            x, residual, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode
        )
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    options = (p, channel_reduce, signed, eps, eps_mode)
    if torch.compiler.is_compiling():
        checks.relu_tap(x, residual, p, channel_reduce, eps, eps_mode)
        return impl.graph_op("relu_tap")(x, residual, *options)[:2]
    try:
        return ReluTapFunction.apply(impl, x, residual, *options)
    except Exception:
        checks.explain(checks.relu_tap, x, residual, p, channel_reduce, eps, eps_mode)
        raise
