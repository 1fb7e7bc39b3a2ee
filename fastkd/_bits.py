"""The options of the operators, packed into one integer: each further argument would cost every call 0.2
microseconds, and each string 0.5.

Floor 0. ``csrc/common/attention_options.h`` and ``fsp_options.h`` have the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SWITCH = (False, True)


class Packing:
    """Where each option lies in the integer. An option takes as many bits as its values need, and its first
    value is 0.
    """

    def __init__(self, choices: Mapping[str, Sequence[Any]]) -> None:
        self.choices = choices
        self._at: dict[str, tuple[int, int]] = {}
        at = 0
        for name, values in choices.items():
            size = (len(values) - 1).bit_length()
            self._at[name] = at, (1 << size) - 1
            at += size
        self.end = 1 << at

    def bits(self, name: str, value: object = True) -> int:
        return self.choices[name].index(value) << self._at[name][0]

    def pack(self, **values: object) -> int:
        return sum(self.bits(name, value) for name, value in values.items())

    def value(self, options: int, name: str) -> Any:
        at, mask = self._at[name]
        return self.choices[name][options >> at & mask]

    def check(self, options: int) -> None:
        if not 0 <= options < self.end:
            raise ValueError(f"options must be bits below {self.end}, got {options}")
        for name, (at, mask) in self._at.items():
            if (options >> at & mask) >= len(self.choices[name]):
                raise ValueError(f"options name no {name}, got {options}")


# The last three belong to a call, not to the loss: which sides need a gradient, and whether the forward pass
# computes the student's gradients too, for the upstream gradient that is the first of its numbers.
ATTENTION = Packing(
    {
        "channel_reduce": ("sum", "mean"),
        "signed": _SWITCH,
        "eps_mode": ("clamp", "add"),
        "pool": ("after", "before"),
        "pool_mode": ("avg", "max"),
        "difference": ("squared", "l2"),
        "stage_reduce": ("sum", "mean"),
        "teacher_is_map": _SWITCH,
        "student_is_map": _SWITCH,
        "student_grad": _SWITCH,
        "teacher_grad": _SWITCH,
        "prepare": _SWITCH,
    }
)

# The switches belong to a call. The loss has with_grad (save dloss/dG for the backward pass), prepare
# (compute the student's gradients too) and teacher_grad (the teacher's gradients will be needed as well); its
# backward pass has negate (for the teacher's gradients); that of a matrix has a_grad and b_grad.
FSP = Packing(
    {
        "pool_mode": ("avg", "max"),
        "pair_reduce": ("sum", "mean"),
        "distance": ("squared", "frobenius", "column_l2"),
        "precision": (None, "ieee", "tf32", "tf32x3"),
        "with_grad": _SWITCH,
        "prepare": _SWITCH,
        "negate": _SWITCH,
        "a_grad": _SWITCH,
        "b_grad": _SWITCH,
        "teacher_grad": _SWITCH,
    }
)
