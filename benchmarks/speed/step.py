"""A whole training step of ResNet-20 with attention transfer: what the losses are worth where they are used.

Rows are eager and compiled steps, each with the reference's formula and with every compiled backend; what
else is in a step is as `auto` has it. The compiled ones decide what `auto` takes inside `torch.compile`: the
operator, or the formula that the compiler fuses with its surroundings.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.models import create_model
from speed.cases import SEED
from speed.measure import Row
from speed.rows import available_backends
from speed.stock import Stock

WEIGHT = 1000.0  # of the loss, as published
# Of the loss against float64, and of the gradient of all parameters in l2 norm: twenty layers in bfloat16
# are no more exact.
TOLERANCE = {
    "float32": {"loss": 1e-4, "gradient": 2e-2},
    "bfloat16 autocast": {"loss": 5e-2, "gradient": 0.5},
}


def _then_tap(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return fastkd.tap(F.relu(x + residual, inplace=True))


NONE, LOSS = "without AT", "loss"  # with the teacher too: the least that a step with AT may take
TAPS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "tap": _then_tap,
    "relu_tap": fastkd.relu_tap,
}


def forward(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor,
    autocast: torch.autocast,
    form: str = LOSS,
    plain: bool = False,
) -> Tensor:
    """Cross-entropy and attention transfer on the three stage outputs, up to the loss. A tap makes their maps
    within the network.

    ``plain``: by the reference's formula.
    """
    with torch.no_grad(), autocast:
        wanted, _ = teacher(images, features=True)
    with autocast:
        features, logits = student(images, features=True, tap=TAPS.get(form))
    loss = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels)
    if form == LOSS:
        transfer = fastkd.reference.attention_transfer_loss if plain else fastkd.attention_transfer_loss
        return loss + transfer(features.stages, wanted.stages, weight=WEIGHT)
    if form in TAPS:
        return loss + fastkd.attention_transfer_loss(
            features.maps, wanted.stages, weight=WEIGHT, student_is_map=True
        )
    return loss


@dataclass(frozen=True)
class Variant:
    """A row: which step, which backend serves its losses, whether it is compiled, how the maps are taken."""

    name: str
    backend: str
    compiled: bool
    form: str = LOSS


def variants() -> list[Variant]:
    made = []
    for compiled, kind in ((False, "eager"), (True, "torch.compile")):
        for backend in ("reference", *available_backends()):
            made.append(Variant(f"{kind}, {backend}", backend, compiled))
    made.append(Variant(f"eager, {NONE}", "reference", False, NONE))
    made += [
        Variant(f"eager, {backend}, {tap}", backend, False, tap)
        for backend in available_backends()
        for tap in TAPS
    ]
    return made


class Step:
    """Networks, one batch, and the gradients in float64. The learning rate is 0: all steps are equal."""

    def __init__(self, precision: str, full: bool):
        generator = torch.Generator().manual_seed(SEED)
        self.batch = 128 if full else 2
        torch.manual_seed(SEED)
        networks = [
            create_model("resnet20" if full else "resnet8").to(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        self.student, self.teacher = networks[0].train(), networks[1].eval().requires_grad_(False)
        self.images = torch.randn(self.batch, 3, 32, 32, generator=generator).to(
            memory_format=torch.channels_last
        )
        self.labels = torch.randint(10, (self.batch,), generator=generator)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32")
        self.optimizer = torch.optim.SGD(self.student.parameters(), 0.0, momentum=0.9, fused=True)
        torch._dynamo.reset()
        self.exact = self._exact()

    def run(self, variant: Variant) -> Callable[[], Tensor]:
        """The whole step: both networks, the losses, backward, optimizer."""
        run: Callable[..., Tensor] = functools.partial(
            forward, form=variant.form, plain=variant.backend == "reference"
        )
        if variant.compiled:
            run = torch.compile(run, fullgraph=True, dynamic=False)

        def step() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = run(self.student, self.teacher, self.images, self.labels, self.autocast)
            loss.backward()
            self.optimizer.step()
            return loss

        return step

    def gradient(self, student: nn.Module) -> Tensor:
        return torch.cat([p.grad.double().flatten() for p in student.parameters() if p.grad is not None])

    def _exact(self) -> tuple[float, Tensor]:
        student, teacher = copy.deepcopy(self.student).double(), copy.deepcopy(self.teacher).double()
        with fastkd.use_backend("reference"):
            loss = forward(
                student, teacher, self.images.double(), self.labels, torch.autocast("cpu", enabled=False)
            )
        loss.backward()
        return loss.item(), self.gradient(student)


class StepGroup:
    """A step as the session sees a group."""

    labels: tuple[str, ...] = ("all threads", "1 thread")

    def __init__(self, precision: str, full: bool):
        self.precision, self.full = precision, full
        self.variants = {variant.name: variant for variant in variants()}
        self.id = f"step AT resnet20 batch 128 {precision}"
        self.shared = self.id

    def names(self, one_thread: bool) -> list[str]:
        """The rows. Compiling takes half a minute and more: it is done for all threads only, since graphs are
        made for a thread count.
        """
        return [
            name
            for name, variant in self.variants.items()
            if not variant.compiled or (self.full and not one_thread)
        ]

    def build(self, stock: Stock) -> Step:
        return Step(self.precision, self.full)

    def row(self, built: Step, name: str) -> Row:
        variant = self.variants[name]
        backend = "auto" if variant.backend == "reference" else variant.backend
        return Row(name, built.run(variant), functools.partial(fastkd.use_backend, backend))

    def check(self, built: Step, row: Row) -> None:
        with row.context():
            value = row.run().item()
        if self.variants[row.name].form == NONE:
            return
        loss, gradient = built.exact
        errors = {
            "loss": abs(value - loss) / abs(loss),
            "gradient": float((built.gradient(built.student) - gradient).norm() / gradient.norm()),
        }
        row.facts["error"] = errors
        limits = TOLERANCE[self.precision]
        if any(not errors[what] <= limits[what] for what in errors):
            row.failed = f"wrong: relative error {errors}, at most {limits} allowed"

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        seconds = median(rows[name].seconds)
        batch = 128 if self.full else 2
        return {"milliseconds": 1e3 * seconds, "images_per_second": batch / seconds, **rows[name].facts}

    def describe(self) -> dict[str, Any]:
        return {"step": "AT, ResNet-20, batch 128, channels_last", "precision": self.precision}
