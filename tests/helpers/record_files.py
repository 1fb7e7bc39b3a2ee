"""What the files of a run hold, and a run that is interrupted."""

from __future__ import annotations

import csv
from pathlib import Path

from fastkd.training import Trainer


def rows_in(table: Path) -> list[dict[str, str]]:
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_of(output):
    """The rows of an output folder's results.csv."""
    return rows_in(output / "results.csv")


def column(folder, name):
    """The numbers in a column of a run's epochs.csv."""
    return [float(row[name]) for row in rows_in(folder / "epochs.csv")]


def interrupt(monkeypatch, after):
    """Ctrl-C at the beginning of this process's epoch number ``after``, counted from 1; returns what puts an
    end to that.
    """
    whole, left = Trainer.train_epoch, after

    def train_epoch(self, epoch, progress):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    return lambda: monkeypatch.setattr(Trainer, "train_epoch", whole)
