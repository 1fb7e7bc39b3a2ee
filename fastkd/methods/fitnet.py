"""Hints (Romero et al., 2015): a regressor of the student's map gives the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.methods.connectors import ConvReg
from fastkd.models import Features
from fastkd.reference.common import widen


class FitNet(Distiller):
    """``beta`` times the mean squared difference of the regressor's map and the teacher's, of one stage.

    A teacher's map to which no regressor fits is averaged to the student's size, as in SimKD's code. All
    toolkits train the hint beside cross-entropy. In the paper, and with ``phases=2``, it is alone in a first
    phase of ``--init-epochs``.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(100.0, "factor of the loss")
        hint: int = option(2, "the stage whose maps are compared, from 1; 0 is the stem")
        relu: bool = option(True, "whether the regressor ends in a ReLU")
        regressor: str = option(
            "conv", "by the sizes of both maps, or none: they are compared as they are", ("conv", "none")
        )
        phases: int = option(1, "2: the hint alone, then the rest without it; 1: all together")

        def __post_init__(self) -> None:
            if self.phases not in (1, 2):
                raise ValueError(f"phases is {self.phases}, wanted 1 or 2")

    title, colour = "FitNet", "#bcbd22"
    canonical = "repdistiller"
    presets = {
        "repdistiller": Preset({"hint": 2, "beta": 100.0}),
        "mdistiller": Preset({"hint": 2, "beta": 100.0}),
        "simkd": Preset({"hint": 1, "beta": 100.0}, Beside(1.0, 1.0)),
        "kdzoo": Preset({"hint": 3, "beta": 0.1, "regressor": "none"}),
        "paper": Preset({"hint": 2, "beta": 100.0, "phases": 2}),
    }
    student_points = teacher_points = Points.MAPS

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.beta, self.hint = options.beta, options.hint
        s, t = (_hint(features, self.hint) for features in (context.student_shapes, context.teacher_shapes))
        if len(s) != 3 or len(t) != 3:
            raise ValueError(
                f"student's map is {tuple(s)}, teacher's is {tuple(t)}: fitnet wanted maps (C, H, W)"
            )
        self.regressor: nn.Module = nn.Identity()
        if options.regressor == "conv":
            self.regressor = ConvReg(s, t, options.relu)
        elif s != t:
            raise ValueError(
                f"fitnet.regressor is none, student's map is {tuple(s)}, teacher's is {tuple(t)}: wanted"
                " equal shapes"
            )

    @classmethod
    def begins(cls, options: Any) -> bool:
        return bool(options.phases == 2)

    def connect(self, batch: Batch, student: Output, teacher: Output) -> Tensor:
        found: Tensor = self.regressor(_hint(student.features, self.hint))
        return found

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        found, wanted = widen(connected, _hint(teacher.features, self.hint))
        if wanted.shape[2:] != found.shape[2:]:
            wanted = F.adaptive_avg_pool2d(wanted, tuple(found.shape[2:]))  # type: ignore[arg-type]
        return self.beta * F.mse_loss(found, wanted)


def _hint(features: Features, hint: int) -> Any:
    """The map of a stage, or its shape."""
    maps: Sequence[Any] = (features.stem, *features.stages)
    if not 0 <= hint < len(maps) or len(maps[hint]) == 0:
        first = 0 if len(features.stem) else 1
        raise ValueError(f"fitnet.hint is {hint}, wanted {first} to {len(maps) - 1}")
    return maps[hint]
