"""Inputs of the attention tests."""

from __future__ import annotations

import random

POWERS = (1, 1.5, 2, 2.7, 3, 4)
SHAPES = (
    (1, 1, 6),
    (2, 3, 7, 7),
    (3, 1, 5, 11),
    (1, 17, 13),
    (2, 64, 8, 8),
    (1, 31, 33, 31),
    (2, 5, 3, 4, 5),
    (3, 2, 1, 7),
    (2, 37, 1, 19),
    (1, 130, 16, 16),
)


def kind(p: float, signed: bool) -> str:
    return "positive" if signed and p != int(p) else random.choice(("normal", "relu"))
