"""Fashion-MNIST (Xiao et al., 2017) in torchvision's layout, gzipped or not; padded to 32x32, 3 channels."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.data.base import Dataset, MissingFiles, check_labels, download
from fastkd.errors import UserError, one_line

FOLDER = Path("FashionMNIST") / "raw"
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _found(root: Path) -> list[Path]:
    """Each of ``FILES``, unpacked or packed. Raises MissingFiles."""
    folder = root / FOLDER
    there = {
        name: [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()] for name in FILES
    }
    absent = [name for name, paths in there.items() if not paths]
    if absent:
        raise MissingFiles(f"{folder} lacks {', '.join(absent)}")
    return [paths[0] for paths in there.values()]


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An idx file of unsigned bytes: 0 0 8 dims, each dimension as a big-endian int32, the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of the three
        text = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"{path} cannot be read: {text}; delete it and fetch the set again") from None
    head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    count = torch.Size(shape).numel()
    if not raw.startswith(head) or len(raw) != len(head) + count:
        sizes = " x ".join(map(str, shape))
        raise UserError(
            f"{path} is damaged: not {sizes} unsigned bytes in idx layout; delete it and fetch the set again"
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=len(head)).view(shape)


def load(root: Path) -> Dataset:
    """Reads the set from ``root``, by torchvision's download if it is not complete. Raises UserError."""
    try:
        paths = _found(root)
    except MissingFiles as missing:
        download("FashionMNIST", "fashion-mnist", root, missing)
        paths = _found(root)
    parts = []
    for images_path, labels_path, count in ((paths[0], paths[1], 60_000), (paths[2], paths[3], 10_000)):
        images = (
            F.pad(_read_idx(images_path, (count, 28, 28)), (2, 2, 2, 2)).unsqueeze(1).expand(count, 3, 32, 32)
        )
        parts += [images, check_labels(_read_idx(labels_path, (count,)), 10, labels_path)]
    return Dataset("fashion-mnist", 10, (0.2860,) * 3, (0.3530,) * 3, True, *parts)
