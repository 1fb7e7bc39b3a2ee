"""Some test images for the sheets of attention maps, and what networks make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import extract
from fastkd.data import Folder
from fastkd.data.feed import AnyDataset
from fastkd.data.files import for_testing, read
from fastkd.models.observed import shows_features

# classes apart from each other, by label; of a set that is not here six labels at even distances
CLASSES: dict[str, dict[int, str]] = {
    "cifar10": {0: "airplane", 1: "automobile", 3: "cat", 5: "dog", 7: "horse", 8: "ship"},
    "cifar100": {8: "bicycle", 13: "bus", 15: "camel", 17: "castle", 53: "orange", 88: "tiger"},
    "fashion-mnist": {0: "T-shirt", 1: "trouser", 2: "pullover", 5: "sandal", 8: "bag", 9: "ankle boot"},
    "digits": {i: str(i) for i in (0, 2, 3, 5, 7, 9)},
}


def examples(data: AnyDataset, side: int = 32) -> tuple[Tensor, list[str]]:
    """The first test image of each class to show, (N, 3, H, W) uint8, and the names of the classes.

    ``side``: of the images of a folder; those of a set in memory have their own.
    """
    numbers = {i * data.classes // 6 for i in range(6)}
    named = data.class_names if isinstance(data, Folder) else [f"class {i}" for i in range(data.classes)]
    wanted = CLASSES.get(data.name) or {i: named[i] for i in sorted(numbers)}
    places = {label: (data.test_labels == label).nonzero() for label in wanted}
    there = [label for label in wanted if len(places[label])]
    which = [int(places[label][0]) for label in there]
    if isinstance(data, Folder):
        found = [for_testing(read(data.test[i]), side).permute(2, 0, 1) for i in which]
        return torch.stack(found), [wanted[label] for label in there]
    return data.test_images[which], [wanted[label] for label in there]


def normalized(images: Tensor, normalization: tuple[Any, Any], model: nn.Module) -> Tensor:
    """uint8 images (N, 3, H, W), normalized, in float32, on the device of ``model``."""
    mean, std = (torch.tensor(part)[:, None, None] for part in normalization)
    return ((images / 255 - mean) / std).to(next(model.parameters()).device)


def stages(model: nn.Module, batch: Tensor, points: Sequence[str] | None = None) -> list[Tensor]:
    """The stages' outputs (N, C, H, W) in eval mode, on the CPU, in float32; ``points`` name them where a
    network does not give its own.
    """
    with torch.no_grad():
        if points is not None:
            found, _ = extract(model.eval(), points)(batch)
        elif shows_features(model):
            found = model.eval()(batch, features=True)[0].stages
        else:
            raise ValueError(f"no points of {type(model).__name__} are known: name them by --student-points")
    return [x.float().cpu() for x in found]
