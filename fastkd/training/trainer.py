"""The training loop: one student, one method, at most one teacher, a recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.data.loader import AnyBatches
from fastkd.distillation import Distillation
from fastkd.errors import UserError
from fastkd.io.console import counted
from fastkd.seeds import generator
from fastkd.training import collectives
from fastkd.training.evaluation import evaluate, placed
from fastkd.training.progress import Progress
from fastkd.training.reading import Reading
from fastkd.training.recipes import Recipe, drops, learning_rate
from fastkd.training.step import Shared, TrainStep


class Wanted(NamedTuple):
    """The step that ``trainer`` takes next: ``step`` (from 1) of ``epoch``."""

    trainer: Trainer
    epoch: int
    step: int


class Trainer:
    """Trains the student of ``distillation`` in place. ``train`` gives the training batches of an epoch by
    its number, ``test`` the test batches, if any.

    ``history`` has one dict an epoch: epoch (from 1), lr (at its end), loss, one mean per loss term,
    train_acc and test_acc in percent, seconds and images_per_second of its training. :meth:`state` holds all
    that changes and :meth:`load` takes it up after any epoch: what is random is drawn per epoch, from its
    number. ``compiled`` and ``captured``: see :class:`TrainStep`. Of several processes each has its part of
    every batch; loss, accuracies and gradients are those of all, batch norms see their own images.
    """

    def __init__(
        self,
        distillation: Distillation,
        train: AnyBatches,
        test: AnyBatches | None,
        recipe: Recipe,
        autocast: torch.autocast,
        compiled: bool = False,
        captured: bool = False,
    ):
        self.device = train.device
        self.distillation = placed(distillation, self.device)
        self.student, self.method = distillation.student, distillation.methods
        self.teacher = distillation.teacher
        self.batches, self.test_batches, self.recipe, self.autocast = train, test, recipe, autocast
        self.parameters = [parameter for parameter in distillation.parameters() if parameter.requires_grad]
        rest: dict[str, Any] = {
            "weight_decay": recipe.weight_decay,
            "nesterov": recipe.nesterov,
            "fused": True,
        }
        self.optimizer = torch.optim.SGD(self.parameters, recipe.lr, recipe.momentum, **rest)
        self.train_step = TrainStep(distillation, self.optimizer, train, compiled, captured)
        self.history: list[dict[str, float]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.step = 0  # in the epoch that runs

    @property
    def steps(self) -> int:
        return self.recipe.epochs * len(self.batches)

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        """One epoch (from 1) and the test after it, appended to ``history``. Raises UserError when the loss
        is no longer a number.
        """
        for _ in self.epoch_steps(epoch, progress):
            pass

    def epoch_steps(self, epoch: int, progress: Progress) -> Generator[Wanted, Shared | None, None]:
        """:meth:`train_epoch`, which stops before each step; see :meth:`train_steps`."""
        begun, compiling = time.perf_counter(), self.train_step.compiling
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # for a method that draws numbers: those of an epoch do not depend on the epochs before it
            purpose = ("steps", epoch, *self.batches.share) if self.batches.share[1] > 1 else ("steps", epoch)
            torch.manual_seed(generator(self.batches.seed, self.batches.stream, *purpose).initial_seed())
            yield from self.train_steps(epoch, progress)
        self.seen = sum(self.batches.sizes())
        collectives.add(self.train_step.sums)
        collectives.broadcast_buffers(self.student, self.method, self.teacher)
        means = self._means(epoch)
        seconds = time.perf_counter() - begun - (self.train_step.compiling - compiling)
        self.reading = Reading(self.batches, seconds)
        if self.test_batches is not None:
            means["test_acc"] = evaluate(self.student, self.test_batches, self.autocast, self.batches.share)
        pace = {"seconds": seconds, "images_per_second": self.seen / seconds}
        rate = learning_rate(self.recipe, epoch * len(self.batches) - 1, self.steps)
        self.history.append({"epoch": epoch, "lr": rate, **means, **pace, **self.reading.figures()})
        if self.test_batches is not None and self.best() is self.history[-1]:
            weights = self.student.state_dict()
            self.best_weights = {name: value.detach().clone() for name, value in weights.items()}
        self.step = 0

    def train_steps(self, epoch: int, progress: Progress) -> Generator[Wanted, Shared | None, None]:
        """The training steps of an epoch: stops before each one, which takes the batch that is then sent to
        it, or its own.
        """
        self.distillation.train()
        self.distillation.set_epoch(epoch - 1, self.recipe.epochs)
        self.train_step.sums.zero_()
        self.seen, begun, own = 0, time.perf_counter(), self.batches.draw(epoch)
        for step, images in enumerate(self.batches.sizes(), 1):
            self.step = step
            self._set_rate((epoch - 1) * len(self.batches) + step - 1)
            shared = yield Wanted(self, epoch, step)
            augment_params = next(own) if shared is None else shared.drawn
            self.train_step(augment_params, images, progress, shared)
            shared = None  # the next batch's features are made while this waits
            self.seen += len(augment_params)
            progress.advance(lambda: self._describe(epoch, time.perf_counter() - begun))

    def _set_rate(self, step: int) -> None:
        if self.recipe.new_optimizer and drops(self.recipe, step, self.steps) != drops(
            self.recipe, max(step - 1, 0), self.steps
        ):
            self.train_step.reset_momentum()
        self.train_step.set_rate(learning_rate(self.recipe, step, self.steps))

    def _means(self, epoch: int) -> dict[str, float]:
        values = [value / self.seen for value in self.train_step.sums.tolist()]
        total = sum(values[:-1])
        if not math.isfinite(total):
            rounded = " or --precision fp32" * (self.batches.dtype != torch.float32)
            raise UserError(
                f"the loss is no longer finite in epoch {epoch}, step {self.step}: try a smaller"
                f" --lr{rounded}"
            )
        return {
            "loss": total,
            **dict(zip(self.distillation.names, values[:-1], strict=True)),
            "train_acc": 100 * values[-1],
        }

    def _describe(self, epoch: int, seconds: float) -> str:
        means = self._means(epoch)
        pace = self.seen * self.batches.share[1] / seconds
        figures = f"loss {means['loss']:.3f} acc {means['train_acc']:.1f} % {pace:.0f} images/s"
        return f"epoch {epoch}/{self.recipe.epochs} {figures}"

    def summary(self) -> str:
        """The last epoch in one line."""
        last = self.history[-1]
        losses = " ".join(f"{name} {last[name]:.4f}" for name in self.distillation.names)
        accuracy = (
            f"train {last['train_acc']:.2f} %  test {last['test_acc']:.2f} %  " if "test_acc" in last else ""
        )
        return f"loss {last['loss']:.4f} ({losses})  {accuracy}{last['images_per_second']:.0f} images/s"

    def best(self) -> dict[str, float]:
        """The first of the epochs with the highest test accuracy."""
        return max(self.history, key=lambda epoch: epoch["test_acc"])

    def pace(self) -> float:
        """Training images a second over all epochs so far."""
        seconds = sum(epoch["seconds"] for epoch in self.history)
        return sum(epoch["images_per_second"] * epoch["seconds"] for epoch in self.history) / seconds

    def weights(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The epoch that the recipe reports, the best or the last: weights, and its line of ``history``."""
        if self.recipe.report == "best":
            return self.best_weights, self.best()
        return self.student.state_dict(), self.history[-1]

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, history, best weights; the teacher too if it is in train mode, since its batch
        norms then change.
        """
        state = {
            "model": self.student.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.teacher is not None and self.distillation.teacher_mode == "train":
            state["teacher"] = self.teacher.state_dict()
        return {**state, "epoch": len(self.history), "history": self.history, "best": self.best_weights}

    def load(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state` gave. Raises what PyTorch raises for any other dict."""
        self.student.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.teacher is not None and self.distillation.teacher_mode == "train":
            self.teacher.load_state_dict(state["teacher"])
        self.history, self.best_weights = list(state["history"]), dict(state["best"])
        if len(self.history) != state["epoch"]:
            raise ValueError(f"{counted(len(self.history), 'epoch')} of history, wanted {state['epoch']}")
