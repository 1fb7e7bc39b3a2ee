"""The image sets. A new one is one file and one line in ``_LOADERS``."""

from __future__ import annotations

import os
from collections.abc import Callable

from fastkd.data import cifar, digits, fashion_mnist, folder
from fastkd.data.base import Dataset, MissingFiles
from fastkd.data.folder import Folder
from fastkd.data.indexed import Indexed
from fastkd.errors import UserError
from fastkd.io.files import as_path

_LOADERS: dict[str, Callable[[str | os.PathLike[str]], Dataset | Folder]] = {
    "cifar10": lambda root: cifar.load(as_path(root), "cifar10"),
    "cifar100": lambda root: cifar.load(as_path(root), "cifar100"),
    "fashion-mnist": lambda root: fashion_mnist.load(as_path(root)),
    "digits": lambda root: digits.load(),
    "folder": lambda root: folder.load(as_path(root)),
}

DATASETS = tuple(_LOADERS)


def choose_dataset(name: str, root: str | os.PathLike[str]) -> tuple[str, str]:
    """(name, why). ``auto`` becomes cifar10 if all of it lies under ``root``, else digits: nothing is
    downloaded. Raises UserError.
    """
    if name == "auto":
        try:
            cifar.found(as_path(root), "cifar10")
        except MissingFiles as missing:
            return "digits", f"auto: no CIFAR-10 under {root}: {missing}"
        return "cifar10", f"auto: CIFAR-10 lies under {root}"
    if name not in _LOADERS:
        raise UserError(f"dataset {name!r} is not known; known: auto, {', '.join(DATASETS)}")
    return name, "as asked"


def load_dataset(name: str, root: str | os.PathLike[str]) -> Dataset | Folder:
    """The whole set, one of ``DATASETS``, from ``root``; downloaded if missing. Raises UserError.

    A :class:`Folder` holds the names of its files, the others their images.
    """
    return _LOADERS[name](root)


__all__ = ["DATASETS", "Dataset", "Folder", "Indexed", "choose_dataset", "load_dataset"]
