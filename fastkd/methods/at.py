"""Attention transfer (Zagoruyko and Komodakis, 2017) on the three stage outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import AttentionTransfer
from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option

# Cross-entropy and KD beside AT: hankyul2's at_st, szagoruyko's flags together, RepDistiller's script with -a
# 1, and as in their KD where the authors never combine them.
_WITH_KD = {
    "hankyul2": Beside(1.0, 0.9),
    "zagoruyko": Beside(0.1, 0.9),
    "repdistiller": Beside(1.0, 1.0),
    "mdistiller": Beside(0.1, 0.9),
    "kdzoo": Beside(1.0, 0.1),
    "torchdistill": Beside(0.9, 0.1),
}


def _preset(name: str, fields: Mapping[str, Any]) -> Preset:
    rest = {key: value for key, value in fields.items() if key != "weight"}
    return Preset({**rest, "beta": fields["weight"]}, with_kd=_WITH_KD.get(name))


class AT(Distiller):
    """``fastkd.AttentionTransfer`` over ``stages``; stem and pooled vector take no part."""

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1000.0, "factor of the loss")
        p: float = option(2.0, "power of the map")
        channel_reduce: str = option("mean", "over channels", ("mean", "sum"))
        signed: bool = option(False, "x^p in place of |x|^p")
        eps: float = option(1e-12, "keeps the norm of a map from zero")
        eps_mode: str = option("clamp", "how", ("clamp", "add"))
        pool: str = option(
            "before", "maps of other sizes are pooled before or after the power", ("before", "after")
        )
        pool_mode: str = option("avg", "how", ("avg", "max"))
        difference: str = option("squared", "of two maps: mean of squares, or l2 norm", ("squared", "l2"))
        stage_reduce: str = option("sum", "over stages", ("sum", "mean"))
        weights: tuple[float, ...] | None = option(None, "one factor a stage")

        def __post_init__(self) -> None:
            self.module()

        def module(self) -> AttentionTransfer:
            fields = asdict(self)
            return AttentionTransfer(weight=fields.pop("beta"), **fields)

    title, colour = "AT", "#0072b2"
    canonical = "zagoruyko"
    presets = {name: _preset(name, fields) for name, fields in AttentionTransfer.presets.items()}
    student_points = teacher_points = Points.MAPS

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.function = options.module()

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(student.features.stages, teacher.features.stages)
