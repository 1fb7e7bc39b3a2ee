"""The overhaul of feature distillation (Heo et al., 2019): maps before the ReLU, cut off below a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd import checks
from fastkd.losses import OFD as OFDLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.methods.connectors import pointwise
from fastkd.reference import ofd_loss, ofd_margin
from fastkd.reference.common import widen

# on purpose, and better in the paper's table 8
_TRAIN_MODE = {"teacher_mode": "train"}


class OFD(Distiller):
    """``fastkd.ofd_loss`` of the maps before the ReLU; the student's go through connectors first.

    The margins come from the teacher's batch norms when the method is built, or from each batch of a process.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1e-3, "factor of the loss")
        margin: str = option(
            "batch_norm",
            "below which the teacher's map is cut off: mean of the negative part of what its norms say, "
            "or of the batch",
            ("batch_norm", "batch"),
        )
        reduce: str = option("sum", "over channels and positions", ("sum", "mean"))
        weights: tuple[float, ...] | None = option(
            None, "one factor a stage; none: 1 for the last, half for the one before it, ..."
        )

    title, colour = "OFD", "#8c564b"
    canonical = "ofd"
    presets = {
        "ofd": Preset({"beta": 1e-3}, recipe=_TRAIN_MODE),
        "mdistiller": Preset({"beta": 1e-3}, recipe=_TRAIN_MODE),
        "kdzoo": Preset({"beta": 0.5, "margin": "batch", "reduce": "mean", "weights": (1 / 3, 1 / 3, 1 / 3)}),
    }
    student_points = teacher_points = Points.PREACT

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        shapes = [features.preact.stages for features in (context.student_shapes, context.teacher_shapes)]
        if len(shapes[0]) != len(shapes[1]):
            raise ValueError(
                f"student has {len(shapes[0])} stages, teacher has {len(shapes[1])}: ofd wanted the same"
                " number"
            )
        for i, (s, t) in enumerate(zip(*shapes, strict=True)):
            if s[1:] != t[1:]:
                raise ValueError(
                    f"student's stage {i + 1} is {tuple(s)}, teacher's is {tuple(t)}: ofd wanted maps of one"
                    " size"
                )
        self.connectors = nn.ModuleList(pointwise(s[0], t[0]) for s, t in zip(*shapes, strict=True))
        count = len(shapes[0])
        weights = checks.stage_weights(options.weights, count)
        if weights is None:
            weights = [0.5 ** (count - 1 - i) for i in range(count)]
        if options.reduce == "mean":
            weights = [weight / shape.numel() for weight, shape in zip(weights, shapes[1], strict=True)]
        self.weights, self.beta = weights, options.beta
        self.function: OFDLoss | None = None
        if options.margin == "batch_norm":
            self.function = OFDLoss(_margins(context.teacher, count), weights=weights, weight=options.beta)

    def connect(self, batch: Batch, student: Output, teacher: Output) -> list[Tensor]:
        return [
            connector(x) for connector, x in zip(self.connectors, student.features.preact.stages, strict=True)
        ]

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        targets = teacher.features.preact.stages
        if self.function is not None:
            found: Tensor = self.function(connected, targets)
            return found
        return ofd_loss(
            connected, targets, [batch_margin(t) for t in targets], weights=self.weights, weight=self.beta
        )


def _margins(teacher: nn.Module, count: int) -> Sequence[Tensor]:
    norms: Sequence[Any] = getattr(teacher, "norms_before_relu", tuple)()
    if len(norms) != count:
        raise ValueError(
            f"teacher is {type(teacher).__name__} with {len(norms)} norms_before_relu() for {count} stages:"
            " ofd wanted one a stage, or the option ofd.margin=batch"
        )
    return [ofd_margin(norm.weight.detach(), norm.bias.detach()) for norm in norms]


def batch_margin(x: Tensor) -> Tensor:
    """(N, C, *S) -> (C,): the mean of each channel's negative numbers, 0 where there are none."""
    (x,) = widen(x.flatten(2))
    return x.clamp_max(0).sum((0, 2)) / (x < 0).sum((0, 2)).clamp_min(1)
