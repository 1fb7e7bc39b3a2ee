"""The image sets. A new one is one file and one line in ``_LOADERS``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastkd import plugins
from fastkd.data import cifar, digits, fashion_mnist, folder
from fastkd.data.base import Dataset, MissingFiles, checked
from fastkd.data.folder import Folder
from fastkd.data.indexed import Indexed
from fastkd.errors import UserError
from fastkd.io.files import as_path

_LOADERS: dict[str, Callable[[Any], Dataset | Folder]] = {
    "cifar10": lambda root: cifar.load(as_path(root), "cifar10"),
    "cifar100": lambda root: cifar.load(as_path(root), "cifar100"),
    "fashion-mnist": lambda root: fashion_mnist.load(as_path(root)),
    "digits": lambda root: digits.load(),
    "folder": lambda root: folder.load(as_path(root)),
}

DATASETS = tuple(_LOADERS)


def register(name: str) -> Callable[[Callable[[Path], Dataset]], Callable[[Path], Dataset]]:
    """A decorator that adds a function of your own, from the folder ``--data`` to a :class:`Dataset`, as the
    set ``name``:

        @fastkd.data.register("flowers")
        def flowers(root): ...

    Raises ValueError for a name that is there already. An entry point of the group "fastkd.data" does the
    same.
    """

    def add(load: Callable[[Path], Dataset]) -> Callable[[Path], Dataset]:
        _register(name, load)
        return load

    return add


def _register(name: str, load: Any, package: str = "") -> None:
    global DATASETS
    if not callable(load):
        raise TypeError(f"dataset {name!r} is {load!r}, wanted a function of a folder")
    if name == "auto":
        raise ValueError("dataset name is 'auto', wanted another one")
    plugins.register("dataset", _LOADERS, name, load, package)
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
    _find(name)
    return name, "as asked"


def _find(name: str) -> None:
    """Registers the set ``name`` if an installed package has it. Raises UserError for an unknown one."""
    try:
        plugins.find("dataset", _LOADERS, name, _register)
    except ValueError as error:
        raise UserError(str(error)) from None
    if name not in _LOADERS:
        raise UserError(f"dataset {name!r} is not known; known: auto, {', '.join(DATASETS)}")


def load_dataset(name: str, root: str | os.PathLike[str]) -> Dataset | Folder:
    """The whole set ``name``, one of ``DATASETS`` or an installed package's, from ``root``; downloaded if
    missing. Raises UserError, for a name that is not known too.

    A :class:`Folder` holds the names of its files, the others their images.
    """
    _find(name)
    if plugins.origin("dataset", name) is None:
        return _LOADERS[name](root)
    return checked(name, _LOADERS[name](as_path(root)))


__all__ = ["DATASETS", "Dataset", "Folder", "Indexed", "choose_dataset", "load_dataset", "register"]
