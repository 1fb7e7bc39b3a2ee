"""Relational knowledge distillation (Park et al., 2019) on the pooled vectors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import RKD as RKDLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Preset, option


class RKD(Distiller):
    """``fastkd.RKD`` on ``pooled``. Of several processes each looks at the pairs of its own images.

    The authors' code for CIFAR was never released: 25 and 50 are RepDistiller's. Their metric learning, and
    torchdistill's sample, have 1 and 2.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1.0, "factor of the loss")
        distance_weight: float = option(25.0, "of the distances in it")
        angle_weight: float = option(50.0, "of the angles in it; at 0 no triple is looked at")

    title, colour = "RKD", "#e69f00"
    canonical = "repdistiller"
    presets = {name: Preset({**fields, "beta": 1.0}) for name, fields in RKDLoss.presets.items()}

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        for shapes in (context.student_shapes, context.teacher_shapes):
            len(shapes.pooled)  # a network that shows none says so here
        fields = asdict(options)
        self.function = RKDLoss(weight=fields.pop("beta"), **fields)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(student.features.pooled, teacher.features.pooled)
