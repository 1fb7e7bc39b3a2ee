"""The flow of the solution procedure (Yim et al., 2017), jointly with the cross-entropy or, as a recipe may say, before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd.losses import FSP as FSPLoss
from fastkd.methods.base import Output, Term


class FSP(Term):
    """``FSP.preset(preset)`` over the pairs (stem, stage 1), (stage 1, stage 2), (stage 2, stage 3); channels must be equal."""

    name = "fsp"
    features = True

    def __init__(self, preset: str, **overrides: Any):
        super().__init__()
        self.loss = FSPLoss.preset(preset, **overrides)

    def forward(self, student: Output, teacher: Output) -> Tensor:
        return self.loss([student.features.stem, *student.features.stages], [teacher.features.stem, *teacher.features.stages])
