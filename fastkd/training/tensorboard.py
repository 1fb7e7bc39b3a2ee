"""TensorBoard's curves of a run, made from its history."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastkd.errors import one_line
from fastkd.io.console import say

EVENTS = "events.out.tfevents.*"
_TAGS = {  # every other column is the loss of a term
    "loss": "loss/total",
    "train_acc": "accuracy/train",
    "test_acc": "accuracy/test",
    "lr": "lr",
    "skipped_images": "skipped images",
    "images_per_second": "images_per_second",
}
_OTHERS = ("epoch", "seconds")


def available() -> bool:
    return find_spec("tensorboard") is not None


class Curves:
    """Event files in the run's folder, one step an epoch; nothing without the package ``tensorboard``.

    The first :meth:`add` writes all epochs, so that a resumed run has each step once. Whatever fails here is
    said once and ends the curves, not the run.
    """

    def __init__(self, folder: Path):
        self.folder, self.done, self.broken = folder, dict[str, int](), not available()
        self.writer: Any = None
        self.earlier: Sequence[str] = ()  # phases that an earlier process finished
        # event files of earlier processes, deleted once a new one holds all of it
        self.replaced: list[Path] = []
        self.threads: list[Any] = []  # the writer's

    def add(self, phase: str, history: Sequence[dict[str, float]]) -> None:
        """The epochs of ``phase`` that are not there yet, under plain tags if "main", else under its name."""
        if self.broken or not history:
            return
        try:
            with _quiet_writer():
                writer = self.writer or self._begin()
                self._write(writer, phase, history[self.done.get(phase, 0) :])
                writer.flush()
            while self.replaced:
                self.replaced.pop().unlink(missing_ok=True)
        except Exception as error:  # the disk, or any of the packages behind TensorBoard
            self._fail(error)
        self.done[phase] = len(history)

    def close(self) -> None:
        if self.writer is None or self.broken:
            return
        try:
            with _quiet_writer():
                self.writer.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.broken = True
        for thread in self.threads:
            with suppress(Exception):
                thread.stop()  # SummaryWriter.close would flush before, and fail once more
        say(
            f"TensorBoard curves in {self.folder} end here"
            f" ({one_line(error) or type(error).__name__}); the run goes on"
        )

    def _begin(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        self.replaced, others = list(self.folder.glob(EVENTS)), set(threading.enumerate())
        try:
            self.writer = writer = SummaryWriter(str(self.folder))
        finally:
            self.threads = [thread for thread in {*threading.enumerate()} - others if _of_writer(thread)]
        for name in self.earlier:
            with open(self.folder / f"{name}.csv", newline="", encoding="utf-8") as file:
                self._write(
                    writer,
                    name,
                    [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)],
                )
        return writer

    def _write(self, writer: Any, phase: str, history: Sequence[dict[str, float]]) -> None:
        for epoch in history:
            for tag, value in tags(phase, epoch):
                writer.add_scalar(tag, value, int(epoch["epoch"]))


@contextmanager
def _quiet_writer() -> Iterator[None]:
    """TensorBoard writes in a thread of its own, whose end would print a traceback beside the error that
    ``flush`` raises anyway.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not _of_writer(arguments.thread):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _of_writer(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


def tags(phase: str, epoch: dict[str, float]) -> Iterator[tuple[str, float]]:
    """(tag, value) of one line of a history."""
    prefix = "" if phase == "main" else f"{phase}/"
    for key, value in epoch.items():
        if key not in _OTHERS:
            yield prefix + _TAGS.get(key, f"loss/{key}"), value
