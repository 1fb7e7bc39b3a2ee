"""What the files of a run hold."""

from __future__ import annotations

import csv

from fastkd.training import Trainer


def rows_of(output):
    with open(output / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def interrupt(monkeypatch, after):
    """Ctrl-C at the beginning of the so-manieth epoch of this process; returns what puts an end to that."""
    whole, left = Trainer.train_epoch, after

    def train_epoch(self, epoch, progress):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    return lambda: monkeypatch.setattr(Trainer, "train_epoch", whole)
