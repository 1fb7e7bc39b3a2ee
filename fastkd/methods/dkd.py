"""Decoupled knowledge distillation (Zhao et al., 2022): KD's two parts, each with its own factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.losses import DKD as DKDLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Preset, option
from fastkd.models import WideResNet


class DKD(Distiller):
    """``fastkd.DKD`` on the logits, beside cross-entropy.

    The loss grows over the first ``warmup`` of the run; the first epoch already has a part of it. ``beta``
    left open is its authors' for the pair: 2 for ResNet-56 and ResNet-20 or ResNet-110 and ResNet-32, 6 for
    wide ResNets, 8 for those of four times the width. Other networks that end in 64 numbers get 2, those
    beside a wide ResNet 6, all others 8, the default of their code.
    """

    @dataclass(frozen=True)
    class Options:
        alpha: float = option(1.0, "factor of the labelled class against all others")
        beta: float | None = option(None, "factor of the other classes; none: by the pair of networks")
        temperature: float = option(4.0, "divides the logits of both networks")
        warmup: float = option(20 / 240, "part of the run in which the loss grows")

        def __post_init__(self) -> None:
            DKDLoss(self.temperature, alpha=self.alpha, beta=self.beta or 0.0)
            if not 0 <= self.warmup <= 1:
                raise ValueError(f"warmup is {self.warmup}, wanted a fraction of the run, 0 to 1")

    title, colour = "DKD", "#44aa99"
    reads_logits_alone = True
    canonical = "mdistiller"
    presets = {
        "mdistiller": Preset({"alpha": 1.0, "temperature": 4.0}),
        "imagenet": Preset({**DKDLoss.presets["imagenet"], "warmup": 1 / 100}),
    }

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        if context.num_classes < 3:
            raise ValueError(f"num_classes is {context.num_classes}: dkd wanted at least 3 classes, or kd")
        beta = published_beta(context) if options.beta is None else options.beta
        self.settled = {"beta": beta} if options.beta is None else {}
        self.warmup = options.warmup
        self.function = DKDLoss(options.temperature, alpha=options.alpha, beta=beta)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        if batch.labels is None:
            raise ValueError("labels are None: dkd tells the labelled class from the others")
        return self.function(student.logits, teacher.logits, batch.labels)

    def weight_at(self, epoch: int, epochs: int) -> float:
        grows = self.warmup * epochs
        return min(1.0, (epoch + 1) / grows) if grows else 1.0


def published_beta(context: BuildContext) -> float:
    """The authors' factor for the pair, or that of the pairs most like it."""
    networks, shapes = (context.student, context.teacher), (context.student_shapes, context.teacher_shapes)
    if any(isinstance(network, WideResNet) for network in networks):
        return 6.0
    return 2.0 if all(side.pooled[0] == 64 for side in shapes) else 8.0
