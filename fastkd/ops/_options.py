"""The options of the attention-transfer loss: spelled out once, validated once, and as the bits that its
operator takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastkd import checks


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
        """The switches as one integer: a string argument costs an operator's caller half a microsecond."""
        bits = 0
        for name, (_, value) in SWITCHES.items():
            given = getattr(self, name)
            if bool(given) if value is True else given == value:
                bits |= BIT[name]
        return bits


# For each switch its value when the bit is clear and when it is set; csrc/common/attention_options.h has the
# same numbers.
SWITCHES = {
    "channel_reduce": ("sum", "mean"),
    "signed": (False, True),
    "eps_mode": ("clamp", "add"),
    "pool": ("after", "before"),
    "pool_mode": ("avg", "max"),
    "difference": ("squared", "l2"),
    "stage_reduce": ("sum", "mean"),
    "teacher_is_map": (False, True),
    "student_is_map": (False, True),
}
BIT = {name: 1 << i for i, name in enumerate(SWITCHES)}

OperatorOptions = tuple[float, float, int, list[float] | None, float]
"""p, eps, bits, weights, weight: the operator's arguments."""


def validated(given: AttentionOptions) -> OperatorOptions:
    """What the operator takes. Raises TypeError or ValueError that names the option."""
    checks.attention_options(*given[:2], *given[3:9], given.weight)
    weights = checks.stage_weights(given.weights, convert=checks.constant)
    p, eps, weight = (
        checks.constant("p", given.p),
        checks.constant("eps", given.eps),
        checks.number("weight", given.weight),
    )
    return p, eps, given.bits(), weights, weight


# typed, since True equals 1.0 and is no number
@functools.lru_cache(maxsize=256, typed=True)
def _validated_before(*given: Any) -> OperatorOptions:
    return validated(AttentionOptions(*given))


def validated_once(given: tuple[Any, ...]) -> OperatorOptions:
    """As :func:`validated`, for the fields of AttentionOptions; remembers what it found right. Not inside
    ``torch.compile``.
    """
    try:
        return _validated_before(*given)
    except TypeError:  # refused, or a list among them, which cannot be remembered
        return validated(AttentionOptions(*given))
