"""The options of the losses: spelled out once, validated once, and as the integer and the numbers that the
operators take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastkd import checks
from fastkd._bits import ATTENTION, FSP

OperatorOptions = tuple[int, tuple[float, ...]]
"""The options as packed by :mod:`fastkd._bits`, and the numbers that follow the upstream gradient."""


class AttentionOptions(NamedTuple):
    """What follows student and teacher in :func:`fastkd.attention_transfer_loss`, in its order."""

    p: float
    channel_reduce: str
    signed: bool
    eps: float
    eps_mode: str
    pool: str
    pool_mode: str
    difference: str
    stage_reduce: str
    weights: Sequence[float] | None
    weight: float
    teacher_is_map: bool
    student_is_map: bool

    def keywords(self) -> dict[str, Any]:
        return dict(zip(self._fields, self))

    def bits(self) -> int:
        given = {name: value for name, value in self.keywords().items() if name in ATTENTION.choices}
        for name in ("signed", "teacher_is_map", "student_is_map"):
            given[name] = bool(given[name])
        return ATTENTION.pack(**given)

    def validated(self) -> OperatorOptions:
        """Raises TypeError or ValueError that names the option."""
        checks.attention_options(*self[:2], *self[3:9], self.weight)
        weights = _weights(self.weights, "stage")
        numbers = checks.constant("p", self.p), checks.constant("eps", self.eps)
        return self.bits(), (*numbers, checks.number("weight", self.weight), *weights)


class FSPOptions(NamedTuple):
    """What follows student and teacher in :func:`fastkd.fsp_loss`, in its order."""

    pool_mode: str
    distance: str
    pair_reduce: str
    weights: Sequence[float] | None
    weight: float
    precision: str | None

    def bits(self) -> int:
        names = ("pool_mode", "distance", "pair_reduce", "precision")
        return FSP.pack(**{name: getattr(self, name) for name in names})

    def validated(self) -> OperatorOptions:
        """Raises TypeError or ValueError that names the option."""
        checks.fsp_options(self.pool_mode, self.distance, self.pair_reduce, self.weight, self.precision)
        weights = _weights(self.weights, "pair")
        return self.bits(), (checks.number("weight", self.weight), *weights)


def _weights(given: object, what: str) -> list[float]:
    """The weights as floats; [] for None: the operators take one number per stage or pair, or no number."""
    weights = checks.stage_weights(given, what=what, convert=checks.constant)
    if weights == []:
        raise ValueError(f"weights has 0 numbers, wanted one a {what}")
    return weights or []


def _once(kind: Callable[..., Any]) -> Callable[[tuple[Any, ...]], OperatorOptions]:
    """``kind(*given).validated()`` that remembers what it found right. Not inside ``torch.compile``."""

    # typed, since True equals 1.0 and is no number
    @functools.lru_cache(maxsize=256, typed=True)
    def remembered(*given: Any) -> OperatorOptions:
        return kind(*given).validated()

    def validated(given: tuple[Any, ...]) -> OperatorOptions:
        try:
            return remembered(*given)
        except TypeError:  # refused, or a list among them, which cannot be remembered
            return kind(*given).validated()

    return validated


attention_options = _once(AttentionOptions)
fsp_options = _once(FSPOptions)
