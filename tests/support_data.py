"""Data small enough for tests that train many times."""

from __future__ import annotations

import dataclasses

from fastkd import data as datasets
from fastkd.data import digits


def small_digits(train: int = 64, test: int = 64) -> None:
    """From now on ``digits`` has its first ``train`` and ``test`` images only, in this process."""
    whole = digits.load()
    part = dataclasses.replace(
        whole,
        train_images=whole.train_images[:train].contiguous(),
        train_labels=whole.train_labels[:train].contiguous(),
        test_images=whole.test_images[:test].contiguous(),
        test_labels=whole.test_labels[:test].contiguous(),
    )
    datasets._LOADERS["digits"] = lambda root: part
