"""The options of the operators, packed in one integer: an argument more costs every call a fifth of a
microsecond, and a string half a one.

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


# The last three are of a call, not of the loss: which sides need a gradient, and whether the forward pass
# makes the student's gradients for the upstream gradient among its numbers.
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

# Of the loss: with_grad keeps dloss/dG for the backward pass, prepare makes the student's gradients. Of its
# backward pass: negate, for the teacher's. Of a matrix's backward pass: a_grad, b_grad. Of the loss again:
# teacher_grad, whether the teacher's gradients will be asked for too.
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
