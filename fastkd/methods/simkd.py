"""SimKD (Chen et al., 2022): a projector before the student's pooling, and the teacher's classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Preset, option
from fastkd.methods.connectors import averaged
from fastkd.reference.common import widen


class Projector(nn.Module):
    """(N, C, H, W) -> (N, ``width``, H', W'), no side longer than ``size``: a larger map is pooled first.

    1x1 to ``width // factor``, 3x3, 1x1 to ``width``, each without bias, with batch norm and ReLU.
    """

    def __init__(self, width_in: int, width: int, size: Sequence[int], factor: int = 2):
        super().__init__()
        middle, self.size = width // factor, tuple(size)
        sizes = ((width_in, middle, 1), (middle, middle, 3), (middle, width, 1))
        layers = [
            (nn.Conv2d(a, b, k, padding=k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b, k in sizes
        ]
        self.layers = nn.Sequential(*(layer for three in layers for layer in three))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(to_smaller(x, self.size))


def to_smaller(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x``, averaged to ``size`` where it is larger."""
    height, width = (min(a, b) for a, b in zip(x.shape[2:], size, strict=True))
    return x if x.shape[2:] == (height, width) else averaged(x, (height, width))


class SimKD(Distiller):
    """``beta`` times the mean squared difference of the projected map and the map that the teacher pools; no
    cross-entropy, no KD.

    The student is tested and saved with the projector and a frozen copy of the teacher's classifier. Its own
    classifier is dropped.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1.0, "factor of the loss")
        factor: int = option(2, "by which the projector's middle is narrower than the teacher's map")

        def __post_init__(self) -> None:
            if self.factor < 1:
                raise ValueError(f"factor is {self.factor}, wanted at least 1")

    title, colour = "SimKD", "#56b4e9"
    canonical = "simkd"
    presets = {"simkd": Preset({"beta": 1.0, "factor": 2}, Beside(0.0, 0.0))}

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.beta = options.beta
        self._parts = context.student_parts()
        (width_in, *_), (width, *size) = context.student_shapes.final, context.teacher_shapes.final
        if len(size) != 2:
            raise ValueError(f"teacher's last map is {(width, *size)}: simkd wanted (C, H, W)")
        if width < options.factor:
            raise ValueError(
                f"simkd.factor is {options.factor}, wanted at most the {width} channels of the teacher's map"
            )
        self.widths, self.size, self.factor = (width_in, width), size, options.factor
        # the student's, so no module of this one
        self._classifier = (copy.deepcopy(context.teacher_classifier("simkd")).requires_grad_(False),)

    def wrap_student(self, student: nn.Module) -> nn.Module:
        self._parts.put_neck(student, Projector(*self.widths, self.size, self.factor))
        self._parts.put_classifier(student, self._classifier[0])
        return student.to(next(student.parameters()))

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        found = student.features.final
        found, wanted = widen(found, to_smaller(teacher.features.final, found.shape[2:]))
        return self.beta * F.mse_loss(found, wanted)
