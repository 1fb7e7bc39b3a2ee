"""NORM (Liu et al., 2023): N copies of the teacher's last map, matched inside the student's last stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.models import Neck
from fastkd.ops.norm import norm_loss

_FACTORS = ((10, 0.1), (20, 0.5), (180, 1.0), (210, 0.5), (math.inf, 0.1))
"""Of the published 241 epochs, counted from 0, those before the first number have the second."""


class Pair(Neck):
    """(N, C, H, W) -> the same: x + BN(conv(u)), u = BN(conv(x)) of ``wide`` channels, ``Features.neck``.

    Both convolutions are 1x1 without bias, begin as a ResNet's do, and nothing between them is nonlinear.
    """

    def __init__(self, width: int, wide: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, record: Any = None) -> Tensor:
        u = self.bn1(self.conv1(x))
        if record is not None:
            record.neck = u
        return self.bn2(self.conv2(u)) + x


class NORM(Distiller):
    """``beta`` times :func:`norm_loss` of the student's neck, a :class:`Pair`, and the teacher's last stage.

    Cross-entropy has the weight ``gamma``; in a sum with KD the KL divergence has 1 - ``gamma``, alone there
    is none. The published result is the best of gamma 1/16, 1/8, 1/4 and 1/2; the weight of KL in "NORM+KD"
    is published nowhere. While training, cross-entropy and KL see layer-normed logits of both networks, times
    ``scale``. The student is tested and saved with the pair.
    """

    @dataclass(frozen=True)
    class Options:
        gamma: float = option(0.125, "weight of cross-entropy; 1 - gamma is that of KD beside it")
        beta: float = option(1.0, "factor of the loss")
        copies: int = option(8, "N: how many times the student has the teacher's channels")
        scale: float = option(2.5, "of the layer-normed logits")

        def __post_init__(self) -> None:
            if not 0 < self.gamma < 1:
                raise ValueError(f"gamma is {self.gamma}, wanted more than 0 and less than 1")
            if self.copies < 1:
                raise ValueError(f"copies is {self.copies}, wanted at least 1")
            if self.scale <= 0:
                raise ValueError(f"scale is {self.scale}, wanted more than 0")

    title, colour = "NORM", "#999933"
    canonical = "norm"
    presets = {"norm": Preset({"gamma": 0.125, "beta": 1.0, "copies": 8, "scale": 2.5})}
    teacher_points = Points.MAPS

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self._parts = context.student_parts()
        if not context.teacher_shapes.stages:
            raise ValueError(
                "teacher_points is None, but norm reads the teacher's last stage: name submodules"
            )
        mine, theirs = context.student_shapes.final, context.teacher_shapes.stages[-1]
        if any(own > other for own, other in zip(mine[1:], theirs[1:], strict=True)):
            raise ValueError(
                f"the student's last map is {tuple(mine)}, the teacher's {tuple(theirs)}: norm pools the"
                " teacher's only, wanted a student's no larger"
            )
        self.widths = int(mine[0]), options.copies * int(theirs[0])
        self.beta, self.copies, self.scale = options.beta, options.copies, options.scale

    @classmethod
    def beside(cls, options: Any, preset: Preset, with_kd: bool) -> Beside:
        return Beside(options.gamma, 1 - options.gamma if with_kd else 0.0)

    def wrap_student(self, student: nn.Module) -> nn.Module:
        self._parts.put_neck(student, Pair(*self.widths))
        return student.to(next(student.parameters()))

    def logits(self, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[1:], eps=1e-7) * self.scale if self.training else z

    def weight_at(self, epoch: int, epochs: int) -> float:
        # as milestones: a fraction times a whole number may come out a rounding below
        done = epoch * 241 / epochs + 1e-6
        return next(factor for end, factor in _FACTORS if done < end)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.beta * norm_loss(student.features.neck, teacher.features.stages[-1], self.copies)
