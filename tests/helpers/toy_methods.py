"""Methods that exist for tests: each owns one of the things that a method may own."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from fastkd.methods import Beside, Definition, Distiller, Points, Preset, definition, option
from fastkd.methods.at import AT
from fastkd.methods.fsp import FSP
from fastkd.methods.kd import KD
from fastkd.models import Neck


class Toy(Distiller):
    """A layer on the pooled vector, KD at 0.5 beside it, and cross-entropy at 0.25."""

    @dataclass(frozen=True)
    class Options:
        beta: float = option(2.0, "factor")
        width: int = option(3, "of the layer")

    title, canonical = "Toy", "repdistiller"
    presets = {"repdistiller": Preset(beside=Beside(0.25, 0.5), recipe={"teacher_mode": "train"})}

    def __init__(self, context, options):
        super().__init__(context, options)
        self.beta, self.seed = options.beta, torch.initial_seed()
        sizes = context.student_shapes.pooled[0], context.teacher_shapes.pooled[0]
        self.layers = nn.ModuleList(nn.Linear(size, options.width) for size in sizes)

    def loss(self, batch, student, teacher, connected):
        s, t = (
            layer(output.features.pooled)
            for layer, output in zip(self.layers, (student, teacher), strict=True)
        )
        return self.beta * (s - t).square().mean()


class Scheduled(Distiller):
    """Reads the maps before the ReLU of the teacher, after a convolution of the student's; its weight grows
    over the run.
    """

    title, canonical = "Scheduled", "repdistiller"
    presets = {"repdistiller": Preset()}
    student_points, teacher_points = Points.MAPS, Points.PREACT

    def __init__(self, context, options):
        super().__init__(context, options)
        self.conv = nn.Conv2d(
            context.student_shapes.stages[2][0], context.teacher_shapes.preact.stages[2][0], 1
        )

    def connect(self, batch, student, teacher):
        return self.conv(student.features.stages[2])

    def loss(self, batch, student, teacher, connected):
        self.seen = connected.dtype, torch.is_autocast_enabled(connected.device.type)
        return (connected.float() - teacher.features.preact.stages[2].float()).square().mean()

    def weight_at(self, epoch, epochs):
        return epoch / epochs


class Bank(Distiller):
    """Keeps the last vector of every image, and returns it as a record."""

    title, canonical = "Bank", "repdistiller"
    presets = {"repdistiller": Preset()}

    def __init__(self, context, options):
        super().__init__(context, options)
        if context.train_labels is None:
            raise ValueError("train_labels is None: bank keeps a row for each image")
        self.register_buffer("epoch", torch.zeros(()))
        self.seed = torch.initial_seed()
        self.register_buffer("bank", torch.zeros(len(context.train_labels), *context.student_shapes.pooled))

    def loss(self, batch, student, teacher, connected):
        pooled = student.features.pooled.float()
        return (pooled - self.bank[batch.index] - self.epoch).square().mean(), pooled.detach()

    def set_epoch(self, epoch, epochs):
        self.epoch.fill_(epoch)

    def update(self, index, record):
        self.bank[index] = record


class Projected(Neck):
    def __init__(self, width_in, width):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 1)

    def forward(self, x, record=None):
        inner = self.conv(x)
        if record is not None:
            record.neck = inner
        return inner.relu()


class Wrapping(Distiller):
    """A neck in the student, and a copy of the teacher's classifier in place of its own; no cross-entropy, as
    SimKD has it.
    """

    title, canonical = "Wrapping", "repdistiller"
    presets = {"repdistiller": Preset(beside=Beside(0.0, 0.0))}

    def __init__(self, context, options):
        super().__init__(context, options)
        self.classifier = (copy.deepcopy(context.teacher.fc),)
        self.widths = context.student_shapes.final[0], context.teacher_shapes.final[0]

    def wrap_student(self, student):
        student.neck, student.fc = Projected(*self.widths), self.classifier[0]
        return student

    def loss(self, batch, student, teacher, connected):
        assert student.features.neck is not None
        return (student.features.final - teacher.features.final).square().mean()


class Doubled(Wrapping):
    title = "Doubled"


class Normed(Distiller):
    """Changes the logits that every loss sees."""

    title, canonical = "Normed", "repdistiller"
    presets = {"repdistiller": Preset()}

    def logits(self, z):
        return 3 * z

    def loss(self, batch, student, teacher, connected):
        return (student.logits - teacher.logits).square().mean()


class Thief(Distiller):
    """Stores a part of a network, which no method may."""

    title, canonical = "Thief", "repdistiller"
    presets = {"repdistiller": Preset()}

    def __init__(self, context, options):
        super().__init__(context, options)
        self.fc = context.teacher.fc


KINDS = {
    "kd": KD, "at": AT, "fsp": FSP, "toy": Toy, "scheduled": Scheduled, "bank": Bank, "wrapping": Wrapping,
    "doubled": Doubled, "normed": Normed, "thief": Thief,
}  # fmt: skip


def define(name: str, preset: str | None = "repdistiller", options=None, words=()) -> Definition:
    """``fastkd.methods.define`` over ``KINDS``."""
    return definition.define(KINDS, name, preset, options, words)
