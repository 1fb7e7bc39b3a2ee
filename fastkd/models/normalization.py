"""Images for a teacher that was trained on images of another normalization than the student's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Normalization = tuple[Sequence[float], Sequence[float]]
"""The mean and the standard deviation of each channel, by which images were normalized."""


def renormalized(
    own: Normalization | None, teachers: Normalization | None, image_shape: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """(scale, shift), float32 (C, 1, 1) or (1, 1, 1): the teacher's images are ``images * scale + shift``.

    (None, None) where both are normalized alike. Raises ValueError.
    """
    if (own is None) != (teachers is None):
        name, other = ("teacher_normalization", "normalization")[:: 1 if teachers is None else -1]
        raise ValueError(f"{name} is None and {other} is given, wanted both, as (mean, std)")
    if own is None or teachers is None:
        return None, None
    (mean, std), (their_mean, their_std) = (
        _numbers(name, side, image_shape[0])
        for name, side in (("normalization", own), ("teacher_normalization", teachers))
    )
    scale, shift = std / their_std, (mean - their_mean) / their_std
    if bool((scale == 1).all() and (shift == 0).all()):
        return None, None
    form = (-1, *[1] * (len(image_shape) - 1))
    return scale.float().view(form), shift.float().view(form)


def _numbers(name: str, given: Normalization, channels: int) -> list[Tensor]:
    """Mean and standard deviation; (channels,) each, or (1,)."""
    try:
        found = [torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in given]
    except (TypeError, ValueError):
        found = []
    right = len(found) == 2 and all(len(x) in (1, channels) for x in found)
    if not right or not bool((found[1] > 0).all()):
        raise ValueError(
            f"{name} is {given!r}, wanted (mean, std) of {channels} channels, each deviation above 0"
        )
    return found
