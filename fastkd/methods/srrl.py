"""Softmax regression (Yang et al., 2021): the teacher's classifier is to answer alike to both vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Preset, option
from fastkd.methods.connectors import pointwise
from fastkd.reference.common import widen


class SRRL(Distiller):
    """``beta`` times the mean squared differences of pooled vectors, and of the classifier's answers.

    The student's map, or its pooled vector, goes through a connector first. The classifier is a frozen copy
    of the teacher's; gradients pass through it. Two methods have this name: the map's is that of KD_SRRL, the
    vector's is in SimKD's code.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(1.0, "factor of the loss")
        regression: float = option(1.0, "factor of the classifier's part in it")
        on: str = option(
            "map", "what goes through the connector: the last map, or the pooled vector", ("map", "vector")
        )

    title, colour = "SRRL", "#17becf"
    canonical = "srrl"
    presets = {"srrl": Preset({"on": "map"}), "simkd": Preset({"on": "vector"}, Beside(1.0, 1.0))}
    weight: Tensor
    bias: Tensor

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.beta, self.regression, self.on = options.beta, options.regression, options.on
        shape = getattr(context.student_shapes, "final" if self.on == "map" else "pooled")
        width = context.teacher_shapes.pooled[0]
        if self.on == "map" and (shape is None or len(shape) != 3):
            raise ValueError(
                f"student's last map is {shape and tuple(shape)}: srrl wanted (C, H, W), or the option"
                " srrl.on=vector"
            )
        linear = context.teacher_classifier("srrl")
        self.connector = pointwise(int(shape[0]), int(width), relu=True)
        self.register_buffer("weight", linear.weight.detach().clone())
        bias = linear.bias
        self.register_buffer(
            "bias", self.weight.new_zeros(len(self.weight)) if bias is None else bias.detach().clone()
        )

    def connect(self, batch: Batch, student: Output, teacher: Output) -> Tensor | None:
        return self.connector(student.features.final) if self.on == "map" else None

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        found, wanted, weight, bias = widen(
            student.features.pooled if connected is None else connected,
            teacher.features.pooled,
            self.weight,
            self.bias,
        )
        found = (self.connector(found[:, :, None, None]) if connected is None else found).mean((2, 3))
        # not the logits, which another method may change
        ours, theirs = (F.linear(x, weight, bias) for x in (found, wanted))
        return self.beta * (F.mse_loss(found, wanted) + self.regression * F.mse_loss(ours, theirs))
