"""Attention transfer (Zagoruyko and Komodakis, 2017) on the three stage outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd.losses import AttentionTransfer
from fastkd.methods.base import Output, Term


class AT(Term):
    """``AttentionTransfer.preset(preset)`` over ``stages``; stem and pooled vector take no part."""

    name = "at"
    features = True

    def __init__(self, preset: str, **overrides: Any):
        super().__init__()
        self.loss = AttentionTransfer.preset(preset, **overrides)

    def forward(self, student: Output, teacher: Output) -> Tensor:
        return self.loss(student.features.stages, teacher.features.stages)
