"""Self-attention distillation (github.com/CRGuan/SAKD) on the three stage outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.losses import SAKD as SAKDLoss
from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option


class Connector(nn.Sequential):
    """(N, ``width_in``, H, W) -> (N, ``width``, H, W): a 1x1 convolution without bias, N(0, sqrt(2 /
    ``width``)), and a batch norm.
    """

    def __init__(self, width_in: int, width: int):
        super().__init__(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))
        nn.init.normal_(self[0].get_parameter("weight"), 0.0, math.sqrt(2 / width))


class SAKD(Distiller):
    """``fastkd.SAKD`` over ``stages``, each of the student's through a :class:`Connector`, at equal width
    too; KD 0.9 comes with it.

    Its authors train with momentum 0.8, build a new optimizer at each drop and leave the teacher in train
    mode. The recipe takes all three from the preset; in a loop of your own ``Distillation(...,
    teacher_mode="train")`` does the last.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(200.0, "factor of the loss")
        weights: tuple[float, ...] | None = option(None, "one factor a stage; none: 1/4, 1/2, 1")

        def __post_init__(self) -> None:
            self.module()

        def module(self) -> SAKDLoss:
            return SAKDLoss(weights=self.weights, weight=self.beta)

    title, colour = "SAKD", "#d55e00"
    canonical = "sakd"
    presets = {
        "sakd": Preset(
            {"beta": 200.0},
            Beside(1.0, 0.9),
            recipe={"momentum": 0.8, "new_optimizer": True, "teacher_mode": "train"},
        )
    }
    student_points = teacher_points = Points.MAPS

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.function = options.module()
        counts = [len(side.stages) for side in (context.student_shapes, context.teacher_shapes)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"student has {counts[0]} stages, teacher has {counts[1]}: sakd wanted the same number"
            )
        pairs = zip(context.student_shapes.stages, context.teacher_shapes.stages, strict=True)
        self.connectors = nn.ModuleList(Connector(int(mine[0]), int(theirs[0])) for mine, theirs in pairs)

    def connect(self, batch: Batch, student: Output, teacher: Output) -> list[Tensor]:
        return [connector(x) for connector, x in zip(self.connectors, student.features.stages, strict=True)]

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(connected, teacher.features.stages)
