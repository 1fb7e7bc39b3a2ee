"""The training loop: one student, one method, at most one teacher, a recipe."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.methods import Method, Output
from fastkd.training.batches import Batches
from fastkd.training.errors import UserError
from fastkd.training.progress import Progress
from fastkd.training.recipes import Recipe, learning_rate


class Loop:
    """Trains ``student`` in place. ``train`` gives the training batches of an epoch by its number, ``test`` the test batches.

    ``history`` has one dict an epoch: epoch (from 1), lr (at its end), loss, one mean per loss term, train_acc and test_acc in percent,
    seconds and images_per_second of its training. :meth:`state` holds all that changes, so a run can be taken up after any epoch.
    """

    def __init__(self, student: nn.Module, method: Method, teacher: nn.Module | None, train: Batches, test: Batches, recipe: Recipe,
                 autocast: torch.autocast):  # fmt: skip
        self.device = train.pixels.device
        self.student = placed(student, self.device)
        self.method = method.to(self.device)
        self.teacher = placed(teacher, self.device).requires_grad_(False) if teacher is not None else None
        self.batches, self.test_batches, self.recipe, self.autocast = train, test, recipe, autocast
        self.parameters = [*student.parameters(), *method.parameters()]
        self.optimizer = torch.optim.SGD(
            self.parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=True
        )
        self.history: list[dict[str, float]] = []
        self.step = 0  # in the epoch that runs

    @property
    def steps(self) -> int:
        return self.recipe.epochs * len(self.batches)

    def train_epoch(self, epoch: int, progress: Progress) -> None:
        """One epoch (from 1) and the test after it, appended to ``history``. Raises UserError when the loss is no longer a number."""
        self.student.train()
        self.method.train()
        if self.teacher is not None:
            self.teacher.train(self.recipe.teacher_mode == "train")
        begun = time.perf_counter()
        # sums over images of each term and of the right answers; they stay on the device and are read about once a second
        self.sums, self.seen = torch.zeros(len(self.method.names) + 1, device=self.device, dtype=torch.float64), 0
        for step, (images, labels) in enumerate(self.batches.train(epoch), 1):
            self.step = step
            self._set_rate(learning_rate(self.recipe, (epoch - 1) * len(self.batches) + step - 1, self.steps))
            self._train_step(images, labels)
            progress.advance(lambda: self._describe(epoch, time.perf_counter() - begun))
        means = self._means(epoch)
        seconds = time.perf_counter() - begun
        rate, accuracy = self.optimizer.param_groups[0]["lr"], evaluate(self.student, self.test_batches, self.autocast)
        pace = {"seconds": seconds, "images_per_second": self.seen / seconds}
        self.history.append({"epoch": epoch, "lr": rate, **means, "test_acc": accuracy, **pace})
        self.step = 0

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        answer: Output | None = None
        if self.teacher is not None:
            with torch.no_grad(), self.autocast:
                answer = self.method.run(self.teacher, images)
        with self.autocast:
            output = self.method.run(self.student, images)
        losses = self.method(output, answer, labels)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        right = (output.logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([*(loss.detach() * len(labels) for loss in losses.values()), right.float()])
        self.seen += len(labels)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _means(self, epoch: int) -> dict[str, float]:
        values = [value / self.seen for value in self.sums.tolist()]
        total = sum(values[:-1])
        if not math.isfinite(total):
            raise UserError(f"the loss is no longer finite in epoch {epoch}, step {self.step}: try a smaller --lr or --precision fp32")
        return {"loss": total, **dict(zip(self.method.names, values[:-1], strict=True)), "train_acc": 100 * values[-1]}

    def _describe(self, epoch: int, seconds: float) -> str:
        means = self._means(epoch)
        figures = f"loss {means['loss']:.3f} acc {means['train_acc']:.1f} % {self.seen / seconds:.0f} images/s"
        return f"epoch {epoch}/{self.recipe.epochs} {figures}"

    def summary(self) -> str:
        """The last epoch in one line."""
        last = self.history[-1]
        losses = " ".join(f"{name} {last[name]:.4f}" for name in self.method.names)
        accuracy = f"train {last['train_acc']:.2f} %  test {last['test_acc']:.2f} %"
        return f"loss {last['loss']:.4f} ({losses})  {accuracy}  {last['images_per_second']:.0f} images/s"

    def best(self) -> dict[str, float]:
        """The first of the epochs with the highest test accuracy."""
        return max(self.history, key=lambda epoch: epoch["test_acc"])

    def pace(self) -> float:
        """Training images a second over all epochs so far."""
        seconds = sum(epoch["seconds"] for epoch in self.history)
        return sum(epoch["images_per_second"] * epoch["seconds"] for epoch in self.history) / seconds

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, history; the teacher too if it is in train mode, since its batch norms then change."""
        state = {"model": self.student.state_dict(), "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.teacher is not None and self.recipe.teacher_mode == "train":
            state["teacher"] = self.teacher.state_dict()
        return {**state, "epoch": len(self.history), "history": self.history}


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` on ``device``, its convolutions channels_last, in place."""
    return model.to(device).to(memory_format=torch.channels_last)


def evaluate(model: nn.Module, batches: Batches, autocast: torch.autocast) -> float:
    """Accuracy in percent over ``batches.test()``. The model is left in eval mode."""
    model.eval()
    right, seen = torch.zeros((), dtype=torch.int64, device=batches.pixels.device), 0
    with torch.no_grad(), autocast:
        for images, labels in batches.test():
            right += (model(images).argmax(1) == labels).sum()
            seen += len(labels)
    return 100 * right.item() / seen
