"""The overhaul of feature distillation (Heo et al., 2019): maps before the ReLU, cut off below a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastkd import checks
from fastkd.losses import OFD as OFDLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Points, Preset, option, paired_stages
from fastkd.methods.connectors import pointwise
from fastkd.ops.ofd import ofd_loss
from fastkd.reference import ofd_margin
from fastkd.reference.common import stage_factors, widen

# on purpose, and better in the paper's table 8
_TRAIN_MODE = {"teacher_mode": "train"}


class OFD(Distiller):
    """``fastkd.ofd_loss`` of the maps before the ReLU; the student's go through connectors first.

    The margins come from the teacher's batch norms, or from its maps of the training images, when the method
    is built; or from each batch of a process.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1e-3, "factor of the loss")
        margin: str = option(
            "batch_norm",
            "below which the teacher's map is cut off: mean of the negative part of what its norms say, "
            "of its maps of all training images, or of the batch",
            ("batch_norm", "data", "batch"),
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
        sides = context.student_shapes.preact.stages, context.teacher_shapes.preact.stages
        pairs = paired_stages("ofd", *sides, same="size")
        self.connectors = nn.ModuleList(pointwise(mine[0], theirs[0]) for mine, theirs in pairs)
        count = len(pairs)
        weights = checks.stage_weights(options.weights, count)
        if weights is None:
            weights = stage_factors(count)
        if options.reduce == "mean":
            weights = [weight / shape.numel() for weight, shape in zip(weights, sides[1], strict=True)]
        self.weights, self.beta = weights, options.beta
        self.function: OFDLoss | None = None
        if options.margin != "batch":
            of_norms = options.margin == "batch_norm"
            found = _margins(context, count) if of_norms else data_margins(context)
            self.function = OFDLoss(found, weights=weights, weight=options.beta)

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


def _margins(context: BuildContext, count: int) -> Sequence[Tensor]:
    try:
        norms: Sequence[Any] = context.teacher_norms()
    except ValueError as error:
        raise ValueError(f"{error}, wanted one, or the option ofd.margin=data or ofd.margin=batch") from None
    if len(norms) != count:
        kind = type(context.teacher).__name__
        raise ValueError(
            f"teacher is {kind} with {len(norms)} norms_before_relu() for {count} stages:"
            " ofd wanted one a stage, or the option ofd.margin=data or ofd.margin=batch"
        )
    return [ofd_margin(norm.weight.detach(), norm.bias.detach()) for norm in norms]


def data_margins(context: BuildContext) -> list[Tensor]:
    """For each stage of the teacher the mean of each channel's negative numbers over all training images."""
    sums: list[tuple[Tensor, Tensor]] = []
    for features in context.teacher_features() if context.teacher_features else ():
        found = [(total.double(), count) for total, count in map(_negatives, features.preact.stages)]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, found, strict=True)] if sums else found
    if not sums:
        raise ValueError(
            "train_images has no batch, wanted those of the training set: ofd.margin=data measures the"
            " teacher's maps of them"
        )
    return [(total / count.clamp_min(1)).float() for total, count in sums]


def batch_margin(x: Tensor) -> Tensor:
    """(N, C, *S) -> (C,): the mean of each channel's negative numbers, 0 where there are none."""
    total, count = _negatives(x)
    return total / count.clamp_min(1)


def _negatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, number) of the negative numbers of each channel, (C,) twice."""
    (x,) = widen(x.flatten(2))
    return x.clamp_max(0).sum((0, 2)), (x < 0).sum((0, 2))
