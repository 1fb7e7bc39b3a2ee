"""The batches of a set, be it in memory or a folder of files."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastkd.data.base import Dataset
from fastkd.data.folder import Folder
from fastkd.data.loader import AnyBatches, Batches
from fastkd.data.streaming import StreamedBatches

AnyDataset = Dataset | Folder


class Feed(NamedTuple):
    """How files are read: arguments of :class:`StreamedBatches`, of which a set in memory needs none."""

    sides: tuple[int, ...] = (224,)
    workers: int = 0
    on_bad: str = "stop"
    advice: str = "--on-bad-image skip goes on without it"


def training(data: AnyDataset, normalization: Any, feed: Feed, **fields: Any) -> AnyBatches:
    """The training images. ``normalization``: (mean, std); ``fields``: arguments of :class:`Batches`."""
    if isinstance(data, Dataset):
        return Batches(data.train_images, data.train_labels, *normalization, **fields)
    fields.pop("pad_mode", None)  # a part of the image is cut out, and nothing is padded
    mean, std = normalization
    return StreamedBatches(data.train, data.train_labels, mean, std, **fields, **feed._asdict())


def testing(
    data: AnyDataset, normalization: Any, feed: Feed, order: Tensor | None = None, **fields: Any
) -> AnyBatches:
    """The test images, in ``order`` if it is given."""
    if isinstance(data, Folder):
        (mean, std), last = normalization, feed._replace(sides=feed.sides[-1:])
        return StreamedBatches(
            data.test, data.test_labels, mean, std, order=order, **fields, **last._asdict()
        )
    images, labels = data.test_images, data.test_labels
    if order is not None:
        images, labels = images[order], labels[order]
    return Batches(images, labels, *normalization, **fields)
