"""Tensors among the arguments: one, one a stage, or a pair a stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.checks.numbers import channels_stand, number, stage_weights

Features = Tensor | Sequence[Tensor] | Mapping[Any, Tensor] | Iterable[Tensor]
"""One feature, or those of several stages in their order."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
    if x.layout is not torch.strided or x.is_nested:  # sparse, of oneDNN, or of tensors of several shapes
        kind = "nested" if x.is_nested else f"of layout {x.layout}"
        raise TypeError(f"{name} is {kind}, wanted a dense tensor")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
    return x


def feature(name: str, x: object, *, spatial: bool = True) -> None:
    """A floating-point (N, C, *S) tensor, one to three spatial dimensions, none empty; else (N, *S)."""
    x = floating(name, x)
    lowest, form = (3, "(N, C, *S)") if spatial else (2, "a map (N, *S)")
    if not lowest <= x.dim() <= lowest + 2:
        raise ValueError(
            f"{name} is {describe(x)}, wanted {form} with one to three spatial dimensions, {lowest} to"
            f" {lowest + 2} in all"
        )
    for size, what in zip(
        x.shape, ("an empty batch", "zero channels") if spatial else ("an empty batch",), strict=False
    ):
        if size == 0:
            raise ValueError(f"{name} is {describe(x)}: {what}, wanted at least one")
    if 0 in x.shape:
        raise ValueError(f"{name} is {describe(x)}: zero positions, wanted at least one")


def listed(value: Any) -> Any:
    """``value``, or a list of what it holds: the values of a dict of features, the items of a generator, each
    in its order.
    """
    # in the order of their cost: these three are what nearly every call brings
    if type(value) is list or type(value) is tuple or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return list(value)
    return value


def channels_second(value: Any, channel_dim: object) -> Any:
    """Features whose channels stand where ``channel_dim`` says, 1 or -1, as (N, C, *S): views, no copies.

    Anything else is returned as it is, for the checks that follow to name.
    """
    channels_stand(channel_dim)
    value = listed(value)
    if channel_dim == 1 or not isinstance(value, (Tensor, list, tuple)):
        return value
    if isinstance(value, Tensor):
        return value.movedim(-1, 1) if value.dim() > 2 else value
    return [channels_second(x, channel_dim) if isinstance(x, Tensor) else x for x in value]


def stages(name: str, value: object) -> list[Tensor]:
    """The tensors of one stage or of several; a lone tensor is a list of one."""
    if type(value) is list:  # what nearly every call brings
        return value
    if isinstance(value, Tensor):
        return [value]
    value = listed(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is {type(value).__name__}, wanted a tensor or a sequence of tensors")
    return list(value)


def same_batch(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: batch sizes differ, wanted the same"
        )
    if x.device != other.device:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: devices differ, wanted the same"
        )


def same_rank(name: str, x: Tensor, other_name: str, other: Tensor, given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: {given} and {wanted} spatial"
            " dimensions, wanted the same number"
        )


def fits(
    name: str,
    i: int,
    x: Tensor,
    size: Sequence[int],
    other_name: str,
    other: Tensor,
    other_size: Sequence[int],
) -> None:
    if any(have > want for have, want in zip(size, other_size, strict=True)):
        raise ValueError(
            f"{name}[{i}] is a map {describe(x)}, {other_name}[{i}] is {describe(other)}: "
            f"a normalized map cannot be pooled, wanted one no larger than the {other_name}'s"
        )


def _named(name: str, tensors: list[Tensor], value: object) -> list[str]:
    return [name] if isinstance(value, Tensor) else [f"{name}[{i}]" for i in range(len(tensors))]


def pairs_up(
    student: object,
    teacher: object,
    *,
    least: int,
    spatial_student: bool = True,
    spatial_teacher: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    students, teachers = stages("student", student), stages("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(
            f"student has {len(students)} stages, teacher has {len(teachers)}: wanted the same number"
        )
    if len(students) < least:
        raise ValueError(f"student has {len(students)} stages, wanted at least {least}")
    s_names, t_names = _named("student", students, student), _named("teacher", teachers, teacher)
    for s_name, t_name, s, t in zip(s_names, t_names, students, teachers, strict=True):
        feature(s_name, s, spatial=spatial_student)
        feature(t_name, t, spatial=spatial_teacher)
        same_batch(s_name, s, t_name, t)
        same_batch(s_name, s, s_names[0], students[0])
    return students, teachers


def stage_pairs(
    student: object, teacher: object, weights: object, weight: object, *, least: int = 1, what: str = "stage"
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors of a loss that has a factor for ``least`` stages in a row."""
    number("weight", weight)
    students, teachers = pairs_up(student, teacher, least=least)
    stage_weights(weights, len(students) - least + 1, what)
    return students, teachers
