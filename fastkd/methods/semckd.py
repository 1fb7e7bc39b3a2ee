"""Semantic calibration (Chen et al., 2021): a student's stage follows a learned mixture of the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.methods.connectors import for_convolutions, laid_as
from fastkd.methods.simkd import to_smaller
from fastkd.ops.batch_norm import conv_norm
from fastkd.reference.common import widen


class Regressor(nn.Sequential):
    """(N, ``width_in``, H, W) -> (N, ``width``, H, W): 1x1 to twice ``width``, 3x3, 1x1, batch norm and ReLU
    between; no bias.
    """

    def __init__(self, width_in: int, width: int):
        middle = 2 * width
        super().__init__(
            nn.Conv2d(width_in, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, width, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, norm, _, second, second_norm, _, last = self
        y = conv_norm(first, norm, for_convolutions(x), relu=True)
        y = conv_norm(second, second_norm, y, relu=True)
        return laid_as(last(y), x)


class Embedding(nn.Sequential):
    """(N, ``width_in``) -> (N, ``width``) of length 1: two linear layers with a ReLU between."""

    def __init__(self, width_in: int, width: int):
        super().__init__(nn.Linear(width_in, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        layers: tuple[Any, ...] = (self[0], self[2])
        if layers[0].weight.dtype == x.dtype:
            return F.normalize(super().forward(x), dim=1)
        # in half precision, in which the layers' own products might not hold sums of similarities
        first, last = ((layer.weight.to(x.dtype), layer.bias.to(x.dtype)) for layer in layers)
        return F.normalize(F.linear(F.linear(x, *first).relu(), *last), dim=1)


def similarities(x: Tensor) -> Tensor:
    """(N, ...) -> (N, N): inner products of the images' features, which float16 could not hold."""
    x = widen(x)[0].flatten(1)
    return x @ x.mT


class SemCKD(Distiller):
    """``beta`` times the squared differences of all pairs of a student's and a teacher's stage, each image's
    pairs weighted by attention.

    A regressor brings a student's map to the channels of a teacher's; the larger of the two maps is averaged
    to the size of the smaller. An image's weights are a softmax over the teacher's stages, of the inner
    products of the query of a student's stage and the key of a teacher's. Both are made from the image's
    similarities to the batch, so the layers have the width of the batch, and the similarities of the student
    have a gradient. Of several processes each looks at its own images. With KD of weight 1.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(400.0, "factor of the loss")
        soft: float = option(1.0, "divides what the softmax takes")
        factor: int = option(4, "by which queries and keys are narrower than the batch")

        def __post_init__(self) -> None:
            if not self.soft > 0:
                raise ValueError(f"soft is {self.soft}, wanted a number above 0")
            if self.factor < 1:
                raise ValueError(f"factor is {self.factor}, wanted at least 1")

    title, colour = "SemCKD", "#117733"
    canonical = "semckd"
    presets = {name: Preset({"beta": 400.0, "soft": 1.0}, Beside(1.0, 1.0)) for name in ("semckd", "simkd")}
    student_points = teacher_points = Points.MAPS
    whole_batches = True

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        if context.batch_size is None or context.batch_size < options.factor:
            raise ValueError(
                f"batch_size is {context.batch_size}, wanted at least {options.factor} images a process: "
                "semckd's layers have that width divided by semckd.factor"
            )
        self.beta, self.soft, self.batch_size = options.beta, options.soft, context.batch_size
        sides = (context.student_shapes, context.teacher_shapes)
        students, teachers = ([int(shape[0]) for shape in side.stages] for side in sides)
        width = context.batch_size // options.factor
        self.queries = nn.ModuleList(Embedding(self.batch_size, width) for _ in students)
        self.keys = nn.ModuleList(Embedding(self.batch_size, width) for _ in teachers)
        self.regressors = nn.ModuleList(nn.ModuleList(Regressor(s, t) for t in teachers) for s in students)

    def connect(self, batch: Batch, student: Output, teacher: Output) -> list[list[Tensor]]:
        return [
            [
                regress(to_smaller(s, t.shape[2:]))
                for regress, t in zip(row, teacher.features.stages, strict=True)  # type: ignore[call-overload]
            ]
            for row, s in zip(self.regressors, student.features.stages, strict=True)
        ]

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: list[list[Tensor]]) -> Tensor:
        students, teachers = student.features.stages, teacher.features.stages
        if len(students[0]) != self.batch_size:
            raise ValueError(
                f"images has {len(students[0])} of them, wanted {self.batch_size}: semckd is built for that"
                " batch_size"
            )
        return self.beta * calibration(connected, teachers, self.attention(students, teachers))

    def attention(self, students: tuple[Tensor, ...], teachers: tuple[Tensor, ...]) -> Tensor:
        """(N, S, T), the weights of the teacher's stages for each of the student's; they add up to 1."""
        queries = torch.stack(
            [embed(similarities(x)) for embed, x in zip(self.queries, students, strict=True)], 1
        )
        keys = torch.stack([embed(similarities(x)) for embed, x in zip(self.keys, teachers, strict=True)], 1)
        return (queries @ keys.mT / self.soft).softmax(2)


def calibration(regressed: list[list[Tensor]], teachers: tuple[Tensor, ...], attention: Tensor) -> Tensor:
    """Mean over images and the student's stages of the attended sum of mean squared differences."""
    differences = [
        torch.stack(
            [
                (x - to_smaller(t, x.shape[2:])).square().flatten(1).mean(1)
                for x, t in (widen(*pair) for pair in zip(row, teachers, strict=True))
            ],
            1,
        )
        for row in regressed
    ]
    return (attention * torch.stack(differences, 1)).sum(2).mean()
