"""Whole training loops: ``fastkd.training.Trainer`` beside a toolkit's, data and all, with stock malloc."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from fastkd.distillation import Distillation
from fastkd.training import Batches, Trainer, get_recipe
from fastkd.training.progress import Progress
from fastkd.training.step import after_each
from speed import toolkit
from speed.measure import Row
from speed.stock import Stock

TOOLKIT, FP32, BF16, COMPILED = (
    "toolkit, float32",
    "loop, float32",
    "loop, bfloat16",
    "loop, bfloat16, compiled",
)
LOSSES = {f"distillation loss in {name}": name for name in (FP32, BF16)}
TITLES = {"at": "AT", "fsp": "FSP", "kd": "KD"}
# of the whole loss on one batch, against the toolkit's formulas in float32
TOLERANCE = {FP32: 1e-3, BF16: 5e-2}


@dataclass(frozen=True)
class Steps:
    """Training steps of one row of one group."""

    method: str
    student: str
    teacher: str
    batch: int
    row: str = ""

    def turn(self, calls: int) -> float:
        """Seconds of a step, all of it or the distillation loss and its gradient alone, in this process."""
        made = _made(replace(self, row=""))
        name = LOSSES.get(self.row, self.row)
        if name not in made:
            made[name] = _ours(self, name) if name != TOOLKIT else (_toolkit(self), [])
        run, spent = made[name]
        spent.clear()
        begun = time.perf_counter()
        for _ in range(calls):
            next(run)
        return sum(spent) / calls if self.row in LOSSES else (time.perf_counter() - begun) / calls

    @property
    def count(self) -> int:
        return 100 * self.batch

    def loop(self, name: str) -> Trainer:
        """The loop as train.py makes it, by RepDistiller's recipe."""
        dtype = torch.float32 if name == FP32 else torch.bfloat16
        images = toolkit.Images(self.count)
        pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2)
        batches = Batches(
            pixels,
            torch.tensor(images.labels),
            (0.5071, 0.4867, 0.4408),
            (0.2675, 0.2565, 0.2761),
            batch_size=self.batch,
            pad_mode="zero",
            dtype=dtype,
        )
        recipe = get_recipe("repdistiller", {"batch_size": self.batch, "lr": 1e-5})
        networks = toolkit.network(self.student, 1), toolkit.network(self.teacher, 2).eval()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        distillation = Distillation(*networks, self.method, preset="repdistiller", autocast=autocast)
        return Trainer(distillation, batches, None, recipe, autocast, name == COMPILED)


@functools.lru_cache(maxsize=1)
def _made(group: Steps) -> dict[str, tuple[Iterator[Any], list[float]]]:
    """The rows of the group that is measured now. Those of the group before are forgotten and freed."""
    torch._dynamo.reset()
    return {}


def _toolkit(what: Steps) -> Iterator[float]:
    return toolkit.steps(what.method, what.student, what.teacher, what.batch, what.count)


def _ours(what: Steps, name: str) -> tuple[Iterator[None], list[float]]:
    """Steps without end, and the time of the loss and its gradient since the list was cleared."""
    loop, spent = what.loop(name), []
    if name != COMPILED:
        distiller: Any = next(iter(loop.distillation.methods.values()))
        distiller.function.register_forward_pre_hook(lambda *_: spent.append(-time.perf_counter()))
        distiller.function.register_forward_hook(functools.partial(_timed, spent))

    def run() -> Iterator[None]:
        for epoch in range(1, 240):
            yield from after_each(loop.train_steps(epoch, Progress("", 1, silent=True)))

    return run(), spent


def _timed(spent: list[float], module: Any, inputs: Any, loss: torch.Tensor) -> None:
    spent.append(time.perf_counter())
    assert loss.grad_fn is not None
    loss.grad_fn.register_prehook(lambda *_: spent.append(-time.perf_counter()))
    loss.grad_fn.register_hook(lambda *_: spent.append(time.perf_counter()))


class LoopGroup:
    """A method and a teacher as the session sees a group."""

    labels: tuple[str, ...] = ("all threads",)

    def __init__(self, method: str, teacher: str, full: bool):
        self.full = full
        names = ("resnet20", teacher, 128) if full else ("resnet8", "resnet8", 4)
        self.steps = Steps(method, *names)
        self.id = f"loop {TITLES[method]} resnet20 from {teacher}"
        self.shared = self.id
        self.rounds = (5, 5) if teacher == "resnet20" else (3, 3)

    def names(self, one_thread: bool) -> list[str]:
        """The rows. Without torchvision there is no toolkit. Compiling is slow, so it is done only where a
        goal asks for it.
        """
        if importlib.util.find_spec("torchvision") is None:
            return []
        small = self.steps.teacher != "resnet110"
        compiled = [COMPILED] * (self.full and small and self.steps.method == "at")
        return [TOOLKIT, FP32, BF16, *compiled, *(LOSSES if small and self.steps.method == "at" else [])]

    def build(self, stock: Stock) -> Stock:
        return stock

    def row(self, built: Stock, name: str) -> Row:
        work = replace(self.steps, row=name)
        return Row(name, functools.partial(work.turn, 1), turn=built.turns(work))

    def check(self, built: Stock, row: Row) -> None:
        """Both loops' losses of one batch, by the same networks."""
        if row.name not in TOLERANCE:
            return
        small = replace(self.steps, batch=min(self.steps.batch, 16))
        loop = small.loop(row.name)
        images, labels = loop.batches.inputs(next(loop.batches.draw(1)))[:2]
        ours = loop.train_step.forward(images, labels).total.item()
        networks = toolkit.network(small.student, 1), toolkit.network(small.teacher, 2).eval()
        with torch.no_grad():
            student, teacher = (net(images.float(), features=True) for net in networks)
            theirs = toolkit.loss(small.method, student, teacher, labels).item()
        row.facts["error"] = {"loss": abs(ours - theirs) / abs(theirs)}
        if not row.facts["error"]["loss"] <= TOLERANCE[row.name]:
            row.failed = f"wrong: loss {ours}, by the toolkit's formulas {theirs}"

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        seconds = median(rows[name].seconds)
        facts: dict[str, Any] = {"milliseconds": 1e3 * seconds, **rows[name].facts}
        return facts if name in LOSSES else {**facts, "images_per_second": self.steps.batch / seconds}

    def describe(self) -> dict[str, Any]:
        return {
            "loop": TITLES[self.steps.method],
            "shape": f"{self.steps.teacher} > {self.steps.student}",
            "workers": toolkit.WORKERS,
        }
