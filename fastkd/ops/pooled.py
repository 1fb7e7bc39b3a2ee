"""The mean of squares over a feature's channels and its mean over space, in one pass over the feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops._differences import dense, fused
from fastkd.ops._register import part_of
from fastkd.reference.common import widen


class _PooledMap(torch.autograd.Function):
    """``apply(x)`` -> (map, mean); the gradients of both become that of x in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        found: tuple[Tensor, Tensor] = torch.ops.fastkd.pooled_map.default(x)
        return found

    @staticmethod
    def backward(ctx: Any, map_grad: Tensor | None, mean_grad: Tensor | None) -> Tensor | None:
        if map_grad is None and mean_grad is None:
            return None
        grads = [x if x is None else x.contiguous() for x in (map_grad, mean_grad)]
        dx: Tensor = torch.ops.fastkd.pooled_map_backward.default(*grads, *ctx.saved_tensors)
        return dx


def pooled_map(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of squares over the channels and the mean over space.

    Args:
        x: (N, C, H, W) floating point.

    Returns: (N, H, W) and (N, C); float32, float64 for float64. Equal ``x.square().mean(1)`` and
    ``x.mean((2, 3))``, of ``x.float()``. On a CPU, a dense feature that is not float64 is read once for both,
    and once for its gradient, of which a second derivative raises RuntimeError.
    """
    if fused(x) and dense(x):
        backends.record_kernel_call()
        return _PooledMap.apply(x)
    (x,) = widen(x)
    return x.square().mean(1), x.mean((2, 3))


part_of(
    "attention_map",
    "pooled_map(Tensor x) -> (Tensor map, Tensor mean)",
    lambda x: (
        x.new_empty((x.shape[0], *x.shape[2:]), dtype=torch.float32),
        x.new_empty(x.shape[:2], dtype=torch.float32),
    ),
)
part_of(
    "attention_map",
    "pooled_map_backward(Tensor? map_grad, Tensor? mean_grad, Tensor x) -> Tensor",
    lambda map_grad, mean_grad, x: torch.empty_like(x),
)
