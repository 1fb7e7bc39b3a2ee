"""A folder of the user's own images as torchvision's ``ImageFolder`` has them: train/CLASS, val/CLASS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastkd.data import files
from fastkd.data.files import Paths
from fastkd.errors import UserError

TESTS = ("val", "test")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Folder:
    """Image files, which are read again in each epoch. Fields that :class:`fastkd.data.Dataset` has too mean
    the same; ``mean`` and ``std`` are ImageNet's.

    ``title`` names the set in tables; ``fingerprint`` is a hash of the names of all its files.
    """

    title: str
    class_names: tuple[str, ...]
    train: Paths
    train_labels: Tensor
    test: Paths
    test_labels: Tensor
    fingerprint: str
    name: str = "folder"
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    flip: bool = True

    @property
    def classes(self) -> int:
        return len(self.class_names)


def load(root: Path) -> Folder:
    """Looks up the files under ``root``; no image is read. Raises UserError."""
    files.pillow()
    held = [name for name in TESTS if (root / name).is_dir()]
    if not (root / "train").is_dir() or not held:
        lacking = ["train"] * (not (root / "train").is_dir()) + ["val or test"] * (not held)
        wanted = f"{root / 'train'}/CLASS/*.jpg and the same in val or test"
        raise UserError(f"--data {root} has no folder {' and no '.join(lacking)}: wanted {wanted}")
    train, test = _part(root / "train"), _part(root / held[0])
    if train.keys() != test.keys():
        only = {
            name: sorted(mine.keys() - other.keys())[:5]
            for name, mine, other in (("train", train, test), (held[0], test, train))
        }
        told = ", ".join(f"{name} alone has {', '.join(found)}" for name, found in only.items() if found)
        raise UserError(f"--data {root}: train and {held[0]} have other classes: {told}")
    if len(train) < 2:
        raise UserError(f"{root / 'train'} has one class, {next(iter(train))}: wanted at least two")
    (paths, labels), (test_paths, test_labels) = _listed(root / "train", train), _listed(root / held[0], test)
    digest = f"{paths.digest()}{test_paths.digest()}"
    return Folder(
        f"folder:{root.resolve().name}", tuple(train), paths, labels, test_paths, test_labels, digest
    )


def _part(folder: Path) -> dict[str, list[str]]:
    classes = files.found(folder)
    if not classes:
        raise UserError(f"{folder} has no folder in it: wanted one a class, with its images")
    for name, images in classes.items():
        if not images:
            raise UserError(f"{folder / name} has no image in it ({', '.join(files.ENDINGS)})")
    return classes


def _listed(folder: Path, classes: dict[str, list[str]]) -> tuple[Paths, Tensor]:
    labels = [torch.full((len(images),), i) for i, images in enumerate(classes.values())]
    return Paths(folder, (name for images in classes.values() for name in images)), torch.cat(labels)
