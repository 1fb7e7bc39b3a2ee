"""A training step on a GPU with attention transfer: what AT adds to it, as a loss and by the ReLU tap.

ResNet-50 with AT at its four stages by the wall clock, and ResNet-20 with AT at its three, captured in a CUDA
graph: there the host costs nothing. The teacher's features are given: its forward pass is the same with every
form, and is not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.models import create_model
from speed.cases import SEED
from speed.gpu import CAPTURED, GRAPH, WALL
from speed.gpu_clock import Captured, timed
from speed.measure import Row
from speed.rows import available_backends
from speed.stock import Stock

WEIGHT = 1000.0
RESNET20, RESNET50 = "resnet20", "resnet50"
NONE, LOSS, TAP = "without AT", "loss", "relu_tap"
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # (width, blocks)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Bottleneck(nn.Module):
    """He et al.'s block with four times as many channels out as within, the stride in its 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            _conv(inputs, width, 1),
            _conv(width, width, 3, stride),
            _conv(width, 4 * width, 1),
        )
        self.shortcut = (
            _conv(inputs, 4 * width, 1, stride) if stride != 1 or inputs != 4 * width else nn.Identity()
        )

    def forward(self, x: Tensor, tap: bool = False) -> tuple[Tensor, Tensor | None]:
        y = self.c(F.relu(self.b(F.relu(self.a(x), inplace=True)), inplace=True))
        if tap:
            return fastkd.relu_tap(y, self.shortcut(x))
        return F.relu(y + self.shortcut(x), inplace=True), None


class ResNet50(nn.Module):
    """`depth` blocks a stage at most, for rehearsals."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.stem, inputs = _conv(3, 64, 7, 2), 64
        stages = nn.ModuleList()
        for i, (width, blocks) in enumerate(STAGES):
            stage = nn.ModuleList()
            for block in range(min(blocks, depth)):
                stage.append(Bottleneck(inputs, width, 2 if i > 0 and block == 0 else 1))
                inputs = 4 * width
            stages.append(stage)
        self.stages: Iterable[Any] = stages
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor, tap: bool) -> tuple[Tensor, list[Tensor]]:
        """Logits, and of each stage its map if ``tap``, else its feature."""
        kept = []
        x = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, 1)
        for stage in self.stages:
            attention = None
            for i, block in enumerate(stage):
                x, attention = block(x, tap and i == len(stage) - 1)
            kept.append(x if attention is None else attention)
        return self.head(x.mean((2, 3))), kept


class Step:
    """Network, batch and the teacher's features. The learning rate is 0, so that all steps are equal."""

    def __init__(self, model: str, device: str, batch: int, full: bool) -> None:
        torch.manual_seed(SEED)
        self.device, large = device, model == RESNET50
        network = ResNet50(6 if full else 1) if large else create_model(model)
        self.network = network.to(device).to(memory_format=torch.channels_last).train()
        size, classes = (224 if full else 32, 1000) if large else (32, 10)
        self.images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.randint(classes, (batch,), device=device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.0, momentum=0.9, fused=True)
        with torch.no_grad(), self.autocast():
            features = self.forward(False)[1]
        self.teacher = [torch.randn_like(x).relu() for x in features]

    def forward(self, tap: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits, and of each stage its map if ``tap``, else its feature."""
        if isinstance(self.network, ResNet50):
            return self.network(self.images, tap)
        features, logits = self.network(self.images, features=True, tap=fastkd.relu_tap if tap else None)
        return logits, features.maps if tap else features.stages

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def run(self, form: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                logits, kept = self.forward(form == TAP)
            loss = F.cross_entropy(logits.float(), self.labels)
            if form != NONE:
                loss = loss + fastkd.attention_transfer_loss(
                    kept, self.teacher, weight=WEIGHT, student_is_map=form == TAP
                )
            loss.backward()
            self.optimizer.step()
            return loss

        return step


class GPUStepGroup:
    """The step as the session sees a group."""

    labels: tuple[str, ...] = ("device",)

    def __init__(self, model: str, device: str, full: bool) -> None:
        self.model, self.device, self.full = model, device, full
        self.clock = GRAPH if model == RESNET20 and device == "cuda" else WALL
        self.batch = (128 if model == RESNET20 else 64) if full else 2
        self.id = self.shared = f"{device} step AT {model}"

    def names(self, one_thread: bool) -> list[str]:
        ours = available_backends(device=self.device, full=self.full) or ["reference"]
        return [NONE, *(f"{form}, {backend}" for backend in ours for form in (LOSS, TAP))]

    def build(self, stock: Stock) -> Step:
        return Step(self.model, self.device, self.batch, self.full)

    def row(self, built: Step, name: str) -> Row:
        form, _, backend = name.partition(", ")
        run, context = built.run(form), functools.partial(fastkd.use_backend, backend or "reference")

        def turn(calls: int, warm: bool, clock: str) -> float:
            with context():
                return timed(run, calls, warm, self.device)

        if self.clock == GRAPH:
            return Row(name, run, context, None, Captured([run] * CAPTURED, context).turn)
        return Row(name, run, context, None, turn)

    def check(self, built: Step, row: Row) -> None:
        """A step must not only run: its loss, from features or from maps, is the reference's, in bfloat16."""
        with row.context():
            value = row.run().item()
        form = row.name.partition(", ")[0]
        if form != NONE:
            with fastkd.use_backend("reference"):
                wanted = built.run(LOSS)().item()
            row.facts["error"] = {"loss": abs(value - wanted) / abs(wanted)}
            if not row.facts["error"]["loss"] <= 2e-2:
                row.failed = f"wrong: loss {value}, by the reference {wanted}"

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        seconds, base = median(rows[name].seconds), median(rows[NONE].seconds)
        return {
            "milliseconds": 1e3 * seconds,
            "images_per_second": self.batch / seconds,
            "over without AT": seconds / base,
            **rows[name].facts,
        }

    def describe(self) -> dict[str, Any]:
        step = f"AT, {self.model}, batch {self.batch}, channels_last"
        return {"device": self.device, "clock": self.clock, "step": step, "precision": "bfloat16 autocast"}
