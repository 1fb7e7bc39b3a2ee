"""The flow of the solution procedure (Yim et al., 2017), jointly with the cross-entropy or, as a recipe may
say, before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import FSP as FSPLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.models import Features


def _preset(fields: Mapping[str, Any]) -> Preset:
    return Preset(
        {**{key: value for key, value in fields.items() if key != "weight"}, "beta": fields["weight"]}
    )


class FSP(Distiller):
    """``fastkd.FSP`` over the pairs of stem and stages 1 to 3, in order; channels must be equal."""

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1.0, "factor of the loss")
        pool_mode: str = option("avg", "how the larger map of a pair is pooled", ("avg", "max"))
        distance: str = option("squared", "of two matrices", ("squared", "frobenius", "column_l2"))
        pair_reduce: str = option("sum", "over pairs", ("sum", "mean"))
        weights: tuple[float, ...] | None = option(None, "one factor a pair")
        precision: str | None = option(None, "of float32 products on a GPU", ("ieee", "tf32", "tf32x3"))

        def __post_init__(self) -> None:
            self.module()

        def module(self) -> FSPLoss:
            fields = asdict(self)
            return FSPLoss(weight=fields.pop("beta"), **fields)

    title, colour = "FSP", "#d55e00"
    canonical = "repdistiller"
    presets = {name: _preset(fields) for name, fields in FSPLoss.presets.items()}
    student_points = teacher_points = Points.MAPS
    initializes = True

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.function = options.module()

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(_chain(student.features), _chain(teacher.features))


def _chain(features: Features) -> list[Tensor]:
    """A network that has no stem to show begins with its first stage."""
    return [*([features.stem] if isinstance(features.stem, Tensor) else []), *features.stages]
