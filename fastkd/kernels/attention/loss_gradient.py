"""The backward pass of the attention-transfer loss; `attention/loss.py` says how it works."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._bits import ATTENTION
from fastkd.kernels.attention.loss_kernels import gradient_kernel
from fastkd.kernels.common.launch import (
    IDENTITY,
    Launch,
    Plans,
    config,
    grid,
    key_of,
    matrix_view,
    power,
    program_bytes,
    served,
)
from fastkd.kernels.common.pool import gradient_of_pool

SIGNED, POOL_MAX = (ATTENTION.bits(name, ATTENTION.choices[name][1]) for name in ("signed", "pool_mode"))


class _Backward:
    """What a backward call of these shapes takes."""

    def __init__(
        self, features: Sequence[Tensor], coefficients: Sequence[Tensor], p: float, options: int
    ) -> None:
        if len(features) != len(coefficients):
            raise ValueError("features and coefficients must be lists of the same length")
        samples, first, items, configs, views = features[0].shape[0], 0, [], [], []
        self.pooled: list[int] = []
        self.direct: list[int] = []
        for i, (x, k) in enumerate(zip(features, coefficients)):
            served(x, "features", features[0].device)
            is_map = x.dim() == k.dim()
            if not is_map and tuple(x.shape[2:]) != tuple(k.shape[1:]):
                self.pooled.append(i)
                continue
            self.direct.append(i)
            out = torch.empty_like(x, device="meta")
            views.append(
                (matrix_view(x.shape, [x.stride(), out.stride()], x.element_size(), is_map=is_map), is_map)
            )
        goal = program_bytes(2 * sum(w.bytes for w, _ in views))
        for w, is_map in views:
            cut = grid(w, goal)
            items.append((first, cut.programs, cut.blocks, cut.steps, w.positions))
            first += samples * cut.programs
            configs.append(config(w, cut, IDENTITY if is_map else power(p, bool(options & SIGNED))))
        numbers = [tuple(w.numbers(j) for w, _ in views) for j in (0, 1)]
        self.launch = Launch(
            gradient_kernel, first, *numbers, tuple(items), samples, tuple(configs), len(items)
        )


_plans = Plans()


def attention_transfer_loss_backward(
    grad: Tensor, features: Sequence[Tensor], coefficients: Sequence[Tensor], p: float, options: int
) -> list[Tensor]:
    """See ``torch.ops.fastkd.attention_transfer_loss_backward``."""
    if not features:
        return []
    key = (key_of(features), key_of(coefficients), grad.dtype, p, options)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _Backward(features, coefficients, p, options)
    outs = [torch.empty_like(x) for x in features]
    if plan.direct:
        xs, ks, to = (tuple([y[i] for i in plan.direct]) for y in (features, coefficients, outs))
        plan.launch((grad, *xs, *ks), grad, xs, ks, to)
    for i in plan.pooled:
        gradient_of_pool(
            grad,
            features[i],
            coefficients[i],
            outs[i],
            power(p, bool(options & SIGNED)),
            max_pool=bool(options & POOL_MAX),
        )
    return outs
