"""Soft targets (Hinton, Vinyals and Dean, 2015)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from fastkd.checks import ACTIVATION
from fastkd.losses import KD as KDLoss
from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Preset, option


class KD(Distiller):
    """``fastkd.KD`` on the logits.

    A preset's ``beside`` holds the share of cross-entropy in KD alone, and KD's own weight beside another
    method: RepDistiller runs KD with ``-r 0.1 -a 0.9``, but ``-a 1`` and ``-r 1`` next to another loss. The
    cross-entropy is that of one right class: a multi-label or regression head gives no labels, and adds its
    own loss of them.
    """

    @dataclass(frozen=True)
    class Options:
        weight: float = option(1.0, "factor of the loss")
        temperature: float = option(4.0, "divides the logits of both networks")
        activation: str = option(
            "softmax", "sigmoid: of each class for itself; identity: squared differences", ACTIVATION
        )
        reduction: str = option("batchmean", "over classes a sum, or a mean", ("batchmean", "mean"))

        def __post_init__(self) -> None:
            self.module()

        def module(self) -> KDLoss:
            return KDLoss(**asdict(self))

    title, colour = "KD", "#009e73"
    reads_logits_alone = True
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
        self.function = options.module()

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        return self.function(student.logits, teacher.logits)
