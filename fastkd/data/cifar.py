"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the python pickles or the binary version, whichever is there."""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.data.base import Dataset, MissingFiles, check_labels, download, joined, read_bytes
from fastkd.errors import UserError, one_line

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Source:
    """Where one of the two sets has its files: (file, records) of training and test part, per layout."""

    name: str
    torchvision: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_bytes: int  # of a record of the binary version; the last one is the (fine) label
    label_key: str  # in the pickles
    folders: tuple[str, str]  # pickles, binary
    train: tuple[str, ...]
    test: str
    train_records: int  # in each file

    def layouts(self) -> dict[str, tuple[str, ...]]:
        names = (*self.train, self.test)
        return {self.folders[0]: names, self.folders[1]: tuple(f"{name}.bin" for name in names)}


# the constants are KD-Zoo's, which hankyul2 uses too
SOURCES = {
    "cifar10": Source(
        "cifar10",
        "CIFAR10",
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        1,
        "labels",
        ("cifar-10-batches-py", "cifar-10-batches-bin"),
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        10_000,
    ),
    "cifar100": Source(
        "cifar100",
        "CIFAR100",
        100,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        2,
        "fine_labels",
        ("cifar-100-python", "cifar-100-binary"),
        ("train",),
        "test",
        50_000,
    ),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, numbers, strings and NumPy arrays; any other class in the file is refused, so a
    file never runs code.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 spells bytes
            return lambda text, encoding: text.encode("latin1")
        for package in ("numpy.core", "numpy._core"):  # NumPy 2 renamed it; files of both kinds exist
            if (module, name) in (
                (f"{package}.multiarray", "_reconstruct"),
                (f"{package}.numeric", "_frombuffer"),
            ):
                found = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
                return getattr(importlib.import_module(module.replace(package, found)), name)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in an image set")


def _read_pickle(path: Path, source: Source, records: int) -> tuple[Tensor, Tensor]:
    try:
        import numpy
    except ImportError:
        raise UserError(
            f"{path}: reading the python version of {source.name} needs numpy (pip install numpy)"
        ) from None
    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = content["data"], numpy.asarray(content[source.label_key])
        if (
            images.dtype != numpy.uint8
            or images.shape != (records, PIXELS)
            or labels.shape != (records,)
            or labels.dtype.kind not in "iu"
        ):
            raise ValueError(
                f"data {images.dtype} {images.shape}, labels {labels.shape}, wanted uint8"
                f" {(records, PIXELS)}, {(records,)}"
            )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        text = one_line(error) or type(error).__name__
        raise UserError(f"{path} is damaged: {text}; delete it and fetch the set again") from None
    checked = check_labels(torch.from_numpy(labels.astype("int64")), source.classes, path)
    return torch.from_numpy(images.reshape(records, 3, 32, 32).copy()), checked


def _read_binary(path: Path, source: Source, records: int) -> tuple[Tensor, Tensor]:
    size = source.label_bytes + PIXELS
    table = torch.frombuffer(read_bytes(path, records * size), dtype=torch.uint8).view(records, size)
    return table[:, source.label_bytes :].reshape(records, 3, 32, 32), check_labels(
        table[:, source.label_bytes - 1], source.classes, path
    )


def found(root: Path, name: str) -> str:
    """The folder under ``root`` in which the set lies whole. Raises MissingFiles."""
    layouts = SOURCES[name].layouts()
    for folder, files in layouts.items():
        if all((root / folder / file).is_file() for file in files):
            return folder
    for folder, files in layouts.items():
        absent = [file for file in files if not (root / folder / file).is_file()]
        if len(absent) < len(files):
            raise MissingFiles(f"{root / folder} lacks {', '.join(absent)}")
    raise MissingFiles(f"neither {' nor '.join(str(root / folder) for folder in layouts)} is there")


def load(root: Path, name: str) -> Dataset:
    """Reads the set from ``root``, by torchvision's download if no layout is complete. Raises UserError."""
    source = SOURCES[name]
    try:
        folder = found(root, name)
    except MissingFiles as missing:
        download(source.torchvision, name, root, missing)
        folder = source.folders[0]
    read = _read_pickle if folder == source.folders[0] else _read_binary
    files = source.layouts()[folder]
    train = joined(read(root / folder / file, source, source.train_records) for file in files[:-1])
    test = read(root / folder / files[-1], source, 10_000)
    return Dataset(name, source.classes, source.mean, source.std, True, *train, *test)
