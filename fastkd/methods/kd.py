"""Soft targets (Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd.losses import KD as KDLoss
from fastkd.methods.base import Output, Term


class KD(Term):
    """``KD.preset(preset)`` on the logits."""

    name = "kd"

    def __init__(self, preset: str, **overrides: Any):
        super().__init__()
        self.loss = KDLoss.preset(preset, **overrides)

    def forward(self, student: Output, teacher: Output) -> Tensor:
        return self.loss(student.logits, teacher.logits)
