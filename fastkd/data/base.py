"""What a data set is here, and the checks that all file readers share."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.checks import describe
from fastkd.errors import UserError, one_line
from fastkd.io.console import say


@dataclass(frozen=True)
class Dataset:
    """A whole set in memory: images uint8 (N, 3, 32, 32), labels int64 (N,); ``mean`` and ``std`` per
    channel, on the scale 0 to 1.
    """

    name: str
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name


def checked(name: str, found: Any) -> Dataset:
    """``found``, which a registered function returned, if it is a set of that name. Raises UserError."""
    if not isinstance(found, Dataset):
        raise UserError(f"dataset {name!r} gives {type(found).__name__}, wanted a fastkd.data.Dataset")
    if found.name != name:
        raise UserError(f"dataset {name!r} has the name {found.name!r}, wanted the one it is registered by")
    for part in ("train", "test"):
        images, labels = getattr(found, f"{part}_images"), getattr(found, f"{part}_labels")
        told = f"dataset {name!r}: {part}_images is {describe(images)}, {part}_labels is {describe(labels)}"
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1:] != (3, 32, 32):
            raise UserError(f"{told}: wanted images (N, 3, 32, 32) uint8")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
            raise UserError(f"{told}: wanted labels (N,) int64, one an image")
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= found.classes:
            raise UserError(f"{told}: labels from {low} to {high}, wanted 0 to {found.classes - 1}")
    return found


class MissingFiles(Exception):
    """No layout of the set is complete under the folder; the message says what was looked for."""


def read_bytes(path: Path, size: int) -> bytearray:
    """The file's bytes, which must be ``size`` many. Raises UserError."""
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(
                f"{path} is damaged: {found:,} bytes, wanted {size:,}; delete it and fetch the set again"
            )
        return bytearray(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def check_labels(labels: Tensor, classes: int, path: Path) -> Tensor:
    """``labels`` as int64 (N,), all within the set's classes. Raises UserError."""
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{path} is damaged: labels from {low} to {high}, wanted 0 to {classes - 1}; delete it and fetch"
            " the set again"
        )
    return labels


def download(torchvision: str, name: str, root: Path, why: MissingFiles) -> None:
    """Lets torchvision's class of that name download the set. Raises UserError with the reason it failed."""
    timeout = socket.getdefaulttimeout()
    folders = (root / torchvision / "raw", root / torchvision, root, *root.parents)
    new = [folder for folder in folders if not folder.exists()]
    try:
        say(f"{name}: {why}; downloading it to {root}")
        socket.setdefaulttimeout(30)  # urllib waits for ever on a silent firewall
        getattr(importlib.import_module("torchvision.datasets"), torchvision)(root, download=True)
    except ImportError:
        raise UserError(
            f"{name}: {why}, and to download it takes torchvision; install that or name the folder with"
            " --data"
        ) from None
    # URLError is an OSError; torchvision raises RuntimeError for a wrong checksum
    except (OSError, RuntimeError) as error:
        reason = one_line(getattr(error, "reason", error))
        raise UserError(
            f"{name}: {why}, and the download failed ({reason}); name its folder with --data"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # which goes while it is empty only: nothing came


def joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (images, labels) of several files, one after the other."""
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)
