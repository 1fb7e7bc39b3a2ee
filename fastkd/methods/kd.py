"""Soft targets (Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import KD as KDLoss
from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Preset, option


class KD(Distiller):
    """``fastkd.KD`` on the logits.

    A preset's ``beside`` holds the share of cross-entropy in KD alone, and KD's own weight beside another
    method: RepDistiller runs KD with ``-r 0.1 -a 0.9``, but ``-a 1`` and ``-r 1`` next to another loss.
    """

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "factor of the loss")
        temperature: float = option(4.0, "divides the logits of both networks")

        def __post_init__(self) -> None:
            KDLoss(self.temperature, weight=self.weight)

    title, colour = "KD", "#009e73"
    canonical = "repdistiller"
    presets = {
        "hankyul2": Preset(KDLoss.presets["hankyul2"], Beside(1.0, 0.9)),
        "zagoruyko": Preset(KDLoss.presets["zagoruyko"], Beside(0.1, 0.9)),
        "repdistiller": Preset(KDLoss.presets["repdistiller"], Beside(0.1, 1.0)),
        "mdistiller": Preset(KDLoss.presets["mdistiller"], Beside(0.1, 0.9)),
        "kdzoo": Preset(KDLoss.presets["kdzoo"], Beside(1.0, 0.1)),
        "torchdistill": Preset(KDLoss.presets["torchdistill"], Beside(0.9, 0.1)),
        "sakd": Preset({"temperature": 4.0, "weight": 0.9}, Beside(1.0, 0.9)),
    }

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.function = KDLoss(options.temperature, weight=options.weight)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(student.logits, teacher.logits)
