"""Image files: found in a folder, and each made an array of pixels."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkd.errors import UserError, one_line

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of the random crop, as torchvision has them
RESIZED = 256 / 224
"""The shorter side of a test image, before its centre is cut out, by the size that is cut out."""


class Paths:
    """The paths of many files under ``root``, in one block of memory.

    Workers that are forked share it: nothing in it has a reference count, which would be written to.
    """

    def __init__(self, root: Path, names: Iterable[str]):
        encoded = [os.fsencode(name) + b"\0" for name in names]
        self.root, self.names = str(root), b"".join(encoded)
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int) -> str:
        begin, end = self.ends[place : place + 2].tolist()
        return os.path.join(self.root, os.fsdecode(self.names[begin : end - 1]))

    def digest(self) -> str:
        """The same for the same names only, whatever folder they lie in."""
        return hashlib.blake2b(self.names, digest_size=8).hexdigest()


def found(folder: Path) -> dict[str, list[str]]:
    """By class, the image files under ``folder``/CLASS, as paths from ``folder``; each in order.

    What begins with a dot is left out. Raises UserError.
    """
    try:
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
        )
        return {name: sorted(_images(folder, name)) for name in classes}
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None


def _images(folder: Path, name: str) -> Iterable[str]:
    with os.scandir(folder / name) as entries:
        for entry in entries:
            if entry.name[0] == ".":
                continue
            path = f"{name}/{entry.name}"
            if entry.name.lower().endswith(ENDINGS):
                yield path
            elif entry.is_dir():
                yield from _images(folder, path)


def pillow() -> Any:
    """``PIL.Image``. Raises UserError where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("--dataset folder reads images by Pillow (pip install pillow)") from None
    return Image


@contextmanager
def _whole_alone() -> Iterator[None]:
    """Pillow refuses a file whose end is missing, whatever else in this process has told it to fill up."""
    from PIL import ImageFile

    told = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = told


def read(path: str) -> Any:
    """The image as Pillow has it, in RGB. Raises OSError or ValueError that names the file, also where only a
    part of it is there.
    """
    image = pillow()
    try:
        with _whole_alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are read all the same
            with image.open(path) as file:
                return file.convert("RGB")
    except Exception as error:  # a damaged file can raise anything, and a worker loses the file's name
        why = getattr(error, "strerror", None) or one_line(str(error).replace(repr(path), "it"))
        raise ValueError(f"{path}: {why or type(error).__name__}") from None


def crop_of(width: int, height: int, random: torch.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of an image: 8 to 100 % of its area, 3:4 to 4:3.

    The distribution of torchvision's ``RandomResizedCrop``.
    """
    numbers = torch.rand(TRIES, 4, generator=random, dtype=torch.float64).tolist()
    low, high = map(math.log, RATIO)
    for area, ratio, x, y in numbers:
        size = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
        shape = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(size * shape)), round(math.sqrt(size / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    # an image so long that none fits: its centre
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def for_training(image: Any, sizes: Sequence[int], random: torch.Generator, flip: bool) -> list[Tensor]:
    """A random part of ``image`` in each of ``sizes``, flipped every second time: uint8 (S, S, 3)."""
    part = image.crop(crop_of(image.width, image.height, random))
    flipped = flip and bool(torch.randint(0, 2, (), generator=random))
    found = [_pixels(part.resize((size, size), pillow().Resampling.BILINEAR)) for size in sizes]
    return [pixels.flip(1) if flipped else pixels for pixels in found]


def for_testing(image: Any, size: int) -> Tensor:
    """The centre of ``image``, whose shorter side is 256 / 224 of ``size``: uint8 (S, S, 3)."""
    width, height = image.size
    short = round(size * RESIZED)
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), pillow().Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _pixels(image.crop((left, top, left + size, top + size)))


def _pixels(image: Any) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
