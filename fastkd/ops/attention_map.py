"""The attention map of a feature: operators, autograd rules, public function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import Backend
from fastkd._private import batched, few_frames
from fastkd.ops import _batched_grads, _cuda_limits
from fastkd.ops._register import autograd, define, differentiable_once
from fastkd.reference.common import accumulator

_MAP = "float p, str channel_reduce, bool signed, bool normalize, float eps, str eps_mode"


def _map_fake(
    x: Tensor, p: Any, channel_reduce: Any, signed: Any, normalize: bool, eps: Any, eps_mode: Any
) -> tuple[Tensor, Tensor]:
    dtype = accumulator([x])
    return x.new_empty((x.shape[0], *x.shape[2:]), dtype=dtype), x.new_empty(
        (x.shape[0] if normalize else 0,), dtype=dtype
    )


def _map_backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


define(f"attention_map(Tensor x, {_MAP}) -> (Tensor map, Tensor norm)", _map_fake)
define(
    f"attention_map_backward(Tensor grad, Tensor x, Tensor map, Tensor norm, {_MAP}) -> Tensor",
    _map_backward_fake,
)
differentiable_once("attention_map_backward")


@few_frames
class AttentionMapFunction(torch.autograd.Function):
    """``apply(impl, x, p, channel_reduce, signed, normalize, eps, eps_mode)`` -> map.

    With q = reduce_c |x|^p, n = ||q||, y = q / max(n, eps) and g the incoming gradient:
    dq = (g - y <g, y>) / n where n > eps, g / eps elsewhere;
    dx = p sign(x) |x|^(p-1) dq, divided by C for "mean".
    """

    @staticmethod
    def forward(ctx: Any, impl: Backend, x: Tensor, *options: Any) -> Tensor:
        y, norm = impl.run("attention_map", x, *options)
        ctx.save_for_backward(x, y, norm)
        ctx.impl, ctx.options = impl, options
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_map_gradients(ctx, grad)


def _map_gradients(ctx: Any, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, norm = ctx.saved_tensors
    if batched(grad):
        names = ("p", "channel_reduce", "signed", "normalize", "eps", "eps_mode")
        formula = functools.partial(reference.attention_map, **dict(zip(names, ctx.options, strict=True)))
        (dx,) = _batched_grads.by_reference(formula, [x], [True], grad)
    else:
        dx = ctx.impl.run_backward("attention_map_backward", grad, x, y, norm, *ctx.options)
    return dx, *(None for _ in ctx.options)


def _graph_map_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[1:]


autograd("attention_map", _map_gradients, _graph_map_context)


def attention_map(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    normalize: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
    channel_dim: int = 1,
) -> Tensor:
    """Attention map of a feature: the mean or sum over channels of its powers, at each position.

    Args:
        x: (N, C, *S), one to three spatial dimensions, float16, bfloat16, float32 or float64, any strides.
        p: power, from 1 to 16.
        channel_reduce: "mean" or "sum" over C.
        signed: x^p instead of abs(x)^p (negative x under a fractional p gives NaN).
        normalize: divide each sample's map by its l2 norm over S.
        eps, eps_mode: the divisor is max(norm, eps) for "clamp", norm + eps for "add".
        channel_dim: where C stands: 1, or -1 for views (N, *S, C) and tokens (N, L, C), without a copy.

    Returns: (N, *S), float32 (float64 for a float64 x).
    Equals ``F.normalize(x.float().abs().pow(p).mean(1).flatten(1)).view(N, *S)`` at the defaults.
    Raises: TypeError, ValueError naming the argument; RuntimeError for a second derivative.
    Source: Zagoruyko, Komodakis, *Paying more attention to attention*, ICLR 2017.
    """
    if channel_dim != 1 or type(channel_dim) is not int:
        x = checks.channels_second(x, channel_dim)
    impl = backends.select("attention_map", (x,), _cuda_limits.attention_map, (p,))
    if impl.name == "reference":
        return reference.attention_map(
            x,
            p,
            channel_reduce=channel_reduce,
            signed=signed,
            normalize=normalize,
            eps=eps,
            eps_mode=eps_mode,
        )
    if not checks.are_floats(p, eps):
        p, eps = checks.constant("p", p), checks.constant("eps", eps)
    options = (p, channel_reduce, signed, normalize, eps, eps_mode)
    if torch.compiler.is_compiling():
        checks.attention_map(x, p, channel_reduce, eps, eps_mode)
        return impl.graph_op("attention_map")(x, *options)[0]
    try:
        return AttentionMapFunction.apply(impl, x, *options)
    except Exception:
        checks.explain(checks.attention_map, x, p, channel_reduce, eps, eps_mode)
        raise
