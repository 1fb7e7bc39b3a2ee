"""Attention maps, taps, and the attention-transfer loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features
from fastkd.reference.common import (
    channel_power_sum,
    combined,
    no_autocast,
    normalized_map,
    pool_to,
    smaller,
    vector_norm,
    widen,
)


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
    """See :func:`fastkd.attention_map`."""
    x = checks.channels_second(x, channel_dim)
    checks.attention_map(x, p, channel_reduce, eps, eps_mode)
    with no_autocast(x):
        (x,) = widen(x)
        q = channel_power_sum(x, p, channel_reduce, signed)
        return normalized_map(q, eps, eps_mode) if normalize else q


def tap(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """See :func:`fastkd.tap`."""
    return x, attention_map(x, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)


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
    """See :func:`fastkd.relu_tap`."""
    checks.relu_tap(x, residual, p, channel_reduce, eps, eps_mode)
    y = torch.relu(x if residual is None else x + residual)
    return y, attention_map(y, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)


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
    channel_dim: int = 1,
) -> Tensor:
    """See :func:`fastkd.attention_transfer_loss`."""
    student = checks.channels_second(student, 1 if student_is_map else channel_dim)
    teacher = checks.channels_second(teacher, 1 if teacher_is_map else channel_dim)
    options = p, channel_reduce, eps, eps_mode, pool, pool_mode, difference, stage_reduce
    are_maps = teacher_is_map, student_is_map
    students, teachers = checks.attention_transfer(student, teacher, *options, weights, weight, *are_maps)

    followed = not torch.compiler.is_compiling() and torch.is_grad_enabled()
    if followed and any(x.requires_grad for x in students + teachers):
        checks.one_position(students, teachers, *are_maps)
    if students[0].dim() + student_is_map == 3:
        checks.tokens("attention_transfer_loss", students, teachers, *are_maps)

    def normalized(x: Tensor, is_map: bool, size: list[int]) -> Tensor:
        if is_map:
            return x
        if pool == "before":
            x = pool_to(x, size, pool_mode)
        q = channel_power_sum(x, p, channel_reduce, signed)
        return normalized_map(pool_to(q.unsqueeze(1), size, pool_mode).squeeze(1), eps, eps_mode)

    with no_autocast(students[0]):
        wide = widen(*students, *teachers)
        terms = []
        for s, t in zip(wide[: len(students)], wide[len(students) :], strict=True):
            size = smaller(s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :])
            s, t = graphs.save_constants(
                normalized(s, student_is_map, size), normalized(t, teacher_is_map, size)
            )
            d = (s - t).flatten(1)
            terms.append(d.square().mean() if difference == "squared" else vector_norm(d, 1).mean())
        return combined(terms, weights, stage_reduce, weight)
