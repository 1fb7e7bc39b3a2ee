"""Where each image stands in the training set, for methods that keep something of every image."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset


class Indexed(Dataset):
    """``(image, label, index)`` for the ``(image, label)`` of any data set of a fixed length.

    ``index`` is the position in this set, 0 to len - 1, also where it is a Subset or a ConcatDataset.
    ``labels`` (len,) int64 are read from the sets' ``targets`` or ``labels`` without loading an image, where
    they have either.
    """

    def __init__(self, dataset: Any):
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is {type(dataset).__name__}, wanted one with a length")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        index = range(len(self))[int(index)]  # as a sequence counts: from the end below 0, IndexError beyond
        image, label = self.dataset[index]
        return image, label, index

    @property
    def labels(self) -> Tensor:
        return torch.as_tensor([_label(self.dataset, i) for i in range(len(self))], dtype=torch.int64)


def _label(dataset: Any, index: int) -> int:
    """The label of one image, by the rules of the sets of PyTorch that hold other sets."""
    if isinstance(dataset, Subset) and type(dataset).__getitem__ is Subset.__getitem__:
        return _label(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset) and type(dataset).__getitem__ is ConcatDataset.__getitem__:
        part = bisect_right(dataset.cumulative_sizes, index)
        return _label(dataset.datasets[part], index - (dataset.cumulative_sizes[part - 1] if part else 0))
    if not isinstance(dataset, (Subset, ConcatDataset)):
        for name in ("targets", "labels"):
            known = getattr(dataset, name, None)
            if known is not None and len(known) == len(dataset):
                return int(known[index])
    return int(dataset[index][1])
