"""One of several students that are trained side by side: its steps, its files and its random numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.data.loader import AnyBatches
from fastkd.errors import UserError
from fastkd.io.console import noted_in
from fastkd.training import distributed, resume, run_dir
from fastkd.training.config import Config
from fastkd.training.phases import training
from fastkd.training.signals import Interrupted
from fastkd.training.step import Shared
from fastkd.training.trainer import Wanted


class Student:
    """One of the students: what it wants next, the state of PyTorch's generators, and how it ended."""

    def __init__(self, config: Config, place: int, title: str):
        self.config, self.place, self.title, self.files = config, place, title, ExitStack()
        self.wants: Wanted | None = None
        self.row: dict[str, Any] = {}
        self.error: UserError | None = None

    def open(self) -> None:
        """Opens its folder, an unfinished one or a new one. Raises UserError."""
        folder = distributed.from_first(lambda: resume.choose(self.config)[1])
        self.run = self.files.enter_context(run_dir.opened(self.config, "student", folder))
        self.random = random_state(self.config.device)

    def begin(
        self, taught: tuple[nn.Module | None, float | None], batches: tuple[AnyBatches, AnyBatches]
    ) -> None:
        """Goes to its first step. Raises UserError."""
        (teacher, accuracy), method = taught, self.config.method
        if teacher is not None and self.config.recipe.teacher_mode == "train":
            teacher = copy.deepcopy(teacher)  # its running averages will change
        self.steps = training(
            self.config, "student", self.run, method, teacher, accuracy, batches, self.place, self.title
        )
        self.go_on(None)
        if self.error is not None:
            raise self.error

    def go_on(self, batch: Shared | None) -> None:
        """Takes its step with ``batch`` and goes to the next one. An error of its own ends it alone, but is
        raised where several processes train: it may be of this one only, and the others wait in a sum.

        Raises Interrupted, PeerError, and what is no UserError.
        """
        with self.at_work():
            try:
                self.wants = self.steps.send(batch)
                return
            except StopIteration as end:
                self.wants, self.row = None, end.value
            except (Interrupted, distributed.PeerError) as error:
                self.wants = None
                self.close(error)
                raise
            except UserError as error:
                self.wants, self.error = None, error
        self.close(self.error)
        if self.error is not None and self.config.processes > 1:
            raise self.error

    def stop(self, why: BaseException) -> str:
        """Ends it as a signal does; returns how far it came, or "" if it has ended already."""
        line = ""
        if self.wants is not None:
            with self.at_work(), suppress(StopIteration, KeyboardInterrupt):
                try:
                    self.steps.throw(why)
                except Interrupted as end:
                    line = str(end)
        self.close(Interrupted(line) if line else why)
        return line

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, only its log gets what is printed, and random numbers come from its own state."""
        device, others = self.config.device, random_state(self.config.device)
        set_random_state(self.random, device)
        try:
            with noted_in([self.run.folder]):
                yield
        finally:
            self.random = random_state(device)
            set_random_state(others, device)

    def close(self, error: BaseException | None) -> None:
        """Ends its log, with ``error`` if that ended it, and lets go of its folder. A second call does
        nothing.
        """
        self.files.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)


def random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for other in state[1:]:
        torch.cuda.set_rng_state(other, device)
