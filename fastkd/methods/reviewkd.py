"""Knowledge review (Chen et al., 2021): deeper student maps join shallower ones and follow the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.losses import HCL
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Points, Preset, option, paired_stages
from fastkd.methods.connectors import for_convolutions, laid_as
from fastkd.models import Features, ResNet, WideResNet


class ABF(nn.Module):
    """Attention-based fusion of one level: (map, what the deeper level passed on or None, size) -> (map like
    the teacher's, to pass on).

    The map is brought to ``middle`` channels. With ``fuses`` it is added to the deeper level's, each times an
    attention map of the two. The sum, resized to ``size``, is passed on, and a 3x3 convolution makes the
    teacher's channels of it.
    """

    def __init__(self, width_in: int, middle: int, width: int, fuses: bool):
        super().__init__()
        reduced = nn.Conv2d(width_in, middle, 1, bias=False)
        out = nn.Conv2d(middle, width, 3, padding=1, bias=False)
        for layer in (reduced, out):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.conv1 = nn.Sequential(reduced, nn.BatchNorm2d(middle))
        self.conv2 = nn.Sequential(out, nn.BatchNorm2d(width))
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuses else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        given = x
        x = self.conv1(for_convolutions(x))
        if self.attention is not None and deeper is not None:
            # the convolution of both as a sum: nothing is joined, and what is resized has two channels
            weight, size_here = self.attention.weight, x.shape[2:]
            mine = F.conv2d(x, weight[:, : x.shape[1]], self.attention.bias)
            theirs = F.conv2d(deeper, weight[:, x.shape[1] :])
            z = (mine + _resized(theirs, size_here)).sigmoid()
            x = x * z[:, :1] + _resized(deeper, size_here) * z[:, 1:]
        x = _resized(x, size)
        return laid_as(self.conv2(x), given), x


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, tuple(size), mode="nearest")


def review(levels: nn.ModuleList, maps: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the levels make of the student's maps, all from the shallowest to the deepest."""
    found, passed = [], None
    for level, x, size in reversed(list(zip(levels, maps, sizes, strict=True))):
        out, passed = level(x, passed, size)
        found.append(out)
    return found[::-1]


class ReviewKD(Distiller):
    """``beta`` times ``fastkd.HCL`` of the reviewed maps: the stages and, as a map of one position, the
    pooled vector.

    The student's maps are those after the ReLU, the teacher's those before it. The loss grows from 0 in the
    first epoch to its weight after a twelfth of the run. ``beta`` left open is what the authors published for
    the pair: 0.6 for ResNet-56 and ResNet-20, 5 for wide networks and those with four times the width, 1 for
    other ResNets.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float | None = option(None, "factor of the loss; none: by the pair of networks")
        warmup: float = option(20 / 240, "part of the run in which the factor grows")
        first: int = option(0, "number of the first epoch in it: 0 or 1")
        before_relu: bool = option(True, "whether the teacher's maps are those before the ReLU")

        def __post_init__(self) -> None:
            if not 0 <= self.warmup <= 1:
                raise ValueError(f"warmup is {self.warmup}, wanted a fraction of the run, 0 to 1")
            if self.first not in (0, 1):
                raise ValueError(f"first is {self.first}, wanted 0 or 1")

    title, colour = "ReviewKD", "#882255"
    canonical = "reviewkd"
    presets = {"reviewkd": Preset({}), "mdistiller": Preset({"first": 1})}
    student_points = Points.MAPS

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.options, self.teacher_points = options, Points.PREACT if options.before_relu else Points.MAPS
        beta = published_weight(context) if options.beta is None else options.beta
        self.settled = {"beta": beta} if options.beta is None else {}
        teacher = context.teacher_shapes.preact if options.before_relu else context.teacher_shapes
        paired_stages("reviewkd", context.student_shapes.stages, teacher.stages)
        widths: list[list[Any]] = [
            [*(shape[0] for shape in side.stages), side.pooled[0]]
            for side in (context.student_shapes, teacher)
        ]
        middle, deepest = min(512, widths[0][-1]), len(widths[0]) - 1
        pairs = enumerate(zip(*widths, strict=True))
        self.levels = nn.ModuleList(
            ABF(width_in, middle, width, fuses=i < deepest) for i, (width_in, width) in pairs
        )
        self.function = HCL(weight=beta)

    def connect(self, batch: Batch, student: Output, teacher: Output) -> list[Tensor]:
        return review(self.levels, _levels(student.features), [x.shape[2:] for x in self._targets(teacher)])

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(connected, self._targets(teacher))

    def weight_at(self, epoch: int, epochs: int) -> float:
        grows = self.options.warmup * epochs
        return min(1.0, (epoch + self.options.first) / grows) if grows else 1.0

    def _targets(self, teacher: Output) -> list[Tensor]:
        return _levels(teacher.features.preact if self.options.before_relu else teacher.features)


def _levels(features: Features) -> list[Tensor]:
    return [*features.stages, features.pooled[:, :, None, None]]


def published_weight(context: BuildContext) -> float:
    """The authors' weight for the pair. They give none for other ResNets, or a ResNet with a wide one."""
    networks, shapes = (context.student, context.teacher), (context.student_shapes, context.teacher_shapes)
    if any(isinstance(network, WideResNet) for network in networks):
        return 5.0
    if not all(isinstance(network, ResNet) for network in networks):
        return 1.0
    if all(side.pooled[0] == 256 for side in shapes):
        return 5.0
    return 0.6 if [len(side.blocks) for side in shapes] == [9, 27] else 1.0
