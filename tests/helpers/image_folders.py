"""Folders of tiny images, and a file with networks as a user has them."""

from __future__ import annotations

from pathlib import Path

FLAGS_WITHOUT_TEACHER = (
    "--dataset folder --data images --student nets.py:student --image-size 16"
    " --epochs 2 --batch-size 6 --lr 0.01 --device cpu"
).split()
"""Of train.py, in a folder with a file ``nets.py`` of NETWORKS and ``images`` of :func:`make_images`."""
FLAGS = [*FLAGS_WITHOUT_TEACHER, "--teacher", "nets.py:teacher", "--teacher-size", "24"]

NETWORKS = '''
"""Networks of a user, small enough for a test."""
from torch import nn


class Twice(nn.Module):
    def forward(self, x):
        return x, x


class Small(nn.Module):
    def __init__(self, classes, widths):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(widths[0], widths[1], 3, 2, 1), nn.ReLU())
        self.twice, self.spare = Twice(), nn.Identity()
        self.head = nn.Linear(widths[1], classes)

    def forward(self, x):
        return self.head(self.twice(self.layer2(self.layer1(x)))[0].mean((2, 3)))


def student(num_classes):
    return Small(num_classes, (4, 8))


def teacher(num_classes):
    return Small(num_classes, (8, 8))


def plain(num_classes):
    sizes = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*sizes, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def halved(num_classes):
    """As timm's networks do, it declares how its images are normalized."""
    network = teacher(num_classes)
    network.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return network


def stubborn(num_classes):
    return Small(10, (4, 8))


def broken(num_classes):
    raise RuntimeError("no weights here")


def leaves(num_classes):
    raise SystemExit(num_classes)


def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


number = 3
'''


def make_images(root: Path, classes=("cat", "dog", "owl"), train=6, test=2, tested="val") -> Path:
    """JPEG files of 20 to 30 by 24 pixels under ``root``/train and ``root``/val, a colour for each class."""
    from PIL import Image

    for part, count in (("train", train), (tested, test)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.effect_noise((20 + i, 24), 90).convert("RGB")
                colour = Image.new("RGB", image.size, tuple(200 * (label == channel) for channel in range(3)))
                Image.blend(image, colour, 0.5).save(folder / f"{i}.jpg")
    return root


def cut_short(path: Path) -> None:
    """Takes the end of a file away, as a download that was stopped does; its lower rows are then missing."""
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 8])
