"""Image sets for tests: small ones, the files of the official ones, and a stand-in for torchvision."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import pickle
import sys
import types

import numpy as np
import pytest

from fastkd import data as datasets
from fastkd.data import digits

QUICK = (
    "--dataset digits --teacher resnet8 --student resnet8 --batch-size 32 --device cpu --no-pictures"
).split()


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


def write_binary(path, records, label_bytes, first_label):
    """A file of the official size, empty but for its first record: label ``first_label`` and pixels 0, 1, 2,
    ... modulo 251.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(records * (label_bytes + 3072))
        file.write(bytes([7] * (label_bytes - 1) + [first_label]) + bytes(i % 251 for i in range(3072)))


def write_pickle(path, records, key, first_label, protocol=4, keys_as_bytes=False, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    data, labels = np.zeros((records, 3072), np.uint8), [0] * records
    data[0], labels[0] = np.arange(3072) % 251, first_label
    content = {"data": data, key: labels, "filenames": ["x.png"], **changes}
    path.write_bytes(
        pickle.dumps({k.encode(): v for k, v in content.items()} if keys_as_bytes else content, protocol)
    )


def write_idx(path, values, pack=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = (
        bytes([0, 0, 8, values.ndim])
        + b"".join(n.to_bytes(4, "big") for n in values.shape)
        + values.tobytes()
    )
    path.write_bytes(gzip.compress(raw, 1) if pack else raw)


def stand_in(monkeypatch, make):
    """torchvision.datasets with ``make(name, root)`` behind each class; only its name and call are
    torchvision's.
    """
    module = types.ModuleType("torchvision.datasets")
    for name in ("CIFAR10", "CIFAR100", "FashionMNIST"):
        setattr(
            module,
            name,
            lambda root, download, name=name: (
                make(name, root) if download else pytest.fail("download=True is missing")
            ),
        )
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    assert importlib.import_module("torchvision.datasets") is module
