"""The flow of the solution procedure (Yim et al., 2017), jointly with the cross-entropy or, as a recipe may
say, before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastkd.losses import FSP as FSPLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Points, Preset, option, paired_stages
from fastkd.models import Features


def _preset(fields: Mapping[str, Any]) -> Preset:
    return Preset(
        {**{key: value for key, value in fields.items() if key != "weight"}, "beta": fields["weight"]}
    )


class FSP(Distiller):
    """``fastkd.FSP`` over the pairs of stem and stages 1 to 3, in order; channels must be equal.

    With ``adapter="1x1"`` they need not be: where they differ, a trained 1x1 convolution without bias makes
    the teacher's channels of the student's map. No published code has it.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1.0, "factor of the loss")
        pool_mode: str = option("avg", "how the larger map of a pair is pooled", ("avg", "max"))
        distance: str = option("squared", "of two matrices", ("squared", "frobenius", "column_l2"))
        pair_reduce: str = option("sum", "over pairs", ("sum", "mean"))
        weights: tuple[float, ...] | None = option(None, "one factor a pair")
        adapter: str = option("none", "1x1: trained convolutions where channels differ", ("none", "1x1"))
        precision: str | None = option(None, "of float32 products on a GPU", ("ieee", "tf32", "tf32x3"))

        def __post_init__(self) -> None:
            self.module()

        def module(self) -> FSPLoss:
            fields = asdict(self)
            fields.pop("adapter")
            return FSPLoss(weight=fields.pop("beta"), **fields)

    title, colour = "FSP", "#d55e00"
    canonical = "repdistiller"
    presets = {name: _preset(fields) for name, fields in FSPLoss.presets.items()}
    student_points = teacher_points = Points.MAPS
    initializes = True

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        chains = _chain(context.student_shapes), _chain(context.teacher_shapes)
        first = 1 - (len(context.student_shapes.stem) > 0)
        same = "channels" if options.adapter == "none" else ""
        pairs = paired_stages("fsp", *chains, same=same, first=first)  # of which stage 0 is the stem
        self.adapters = nn.ModuleList(_adapter(mine[0], theirs[0]) for mine, theirs in pairs)
        self.function = options.module()

    def connect(self, batch: Batch, student: Output, teacher: Output) -> list[Tensor]:
        maps = _chain(student.features)
        return [adapter(x) for adapter, x in zip(self.adapters, maps, strict=True)]

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(connected, _chain(teacher.features))


def _adapter(width_in: int, width: int) -> nn.Module:
    if width_in == width:
        return nn.Identity()
    convolution = nn.Conv2d(width_in, width, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _chain(features: Features) -> list[Any]:
    """Maps, or their shapes. A network that has no stem to show begins with its first stage."""
    return [*([features.stem] if len(features.stem) else []), *features.stages]
