"""The image sets. A new one is one file and one line in ``_LOADERS``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastkd.training.datasets import cifar, digits, fashion_mnist
from fastkd.training.datasets.base import Dataset, MissingFiles
from fastkd.training.errors import UserError

_LOADERS: dict[str, Callable[[Path], Dataset]] = {
    "cifar10": lambda root: cifar.load(root, "cifar10"),
    "cifar100": lambda root: cifar.load(root, "cifar100"),
    "fashion-mnist": fashion_mnist.load,
    "digits": lambda root: digits.load(),
}

DATASETS = tuple(_LOADERS)


def choose_dataset(name: str, root: Path) -> tuple[str, str]:
    """(name, why). ``auto`` becomes cifar10 if all of it lies under ``root``, else digits: nothing is downloaded. Raises UserError."""
    if name == "auto":
        try:
            cifar.found(root, "cifar10")
        except MissingFiles as missing:
            return "digits", f"auto: no CIFAR-10 under {root}: {missing}"
        return "cifar10", f"auto: CIFAR-10 lies under {root}"
    if name not in _LOADERS:
        raise UserError(f"dataset {name!r} is not known; known: auto, {', '.join(DATASETS)}")
    return name, "as asked"


def load_dataset(name: str, root: Path) -> Dataset:
    """The whole set, one of ``DATASETS``; files are looked for under ``root`` and downloaded when missing. Raises UserError."""
    return _LOADERS[name](root)


__all__ = ["DATASETS", "Dataset", "choose_dataset", "load_dataset"]
