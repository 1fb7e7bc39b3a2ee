"""Where each image stands, whatever sets lie inside each other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from fastkd.data import Indexed


class Folder(Dataset):
    """As torchvision's ImageFolder: images are loaded when they are asked for, ``targets`` are there."""

    def __init__(self, targets):
        self.targets, self.loaded = targets, 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.loaded += 1
        return torch.full((3,), float(index)), self.targets[index]


class Doubled(Subset):
    """A subset whose images are others than those of its set: PyTorch asks for ``__getitems__`` too."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image * 2, label + 10

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_index_and_labels_of_sets_in_sets():
    folder, tensors = Folder([0, 1, 2, 1]), TensorDataset(torch.ones(2, 3), torch.tensor([5, 6]))
    whole = Indexed(ConcatDataset([Subset(folder, [3, 0]), tensors, Doubled(folder, [2, 1])]))
    assert whole.labels.tolist() == [1, 0, 5, 6, 12, 11] and whole.labels.dtype == torch.int64
    seen = [(int(label), int(index)) for _, label, index in DataLoader(whole, batch_size=None)]
    assert seen == list(zip([1, 0, 5, 6, 12, 11], range(6), strict=True))
    images, labels, index = next(iter(DataLoader(whole, batch_size=6)))
    assert torch.equal(index, torch.arange(6)) and torch.equal(labels, whole.labels)
    assert images[:, 0].tolist() == [3, 0, 1, 1, 4, 2]


def test_labels_load_no_image():
    folder = Folder([0, 1, 2, 1])
    assert Indexed(Subset(folder, [2, 3])).labels.tolist() == [2, 1] and folder.loaded == 0


def test_it_counts_as_a_sequence_does():
    whole = Indexed(Folder([4, 5]))
    assert len(whole) == 2 and whole[-1][1:] == (5, 1)
    with pytest.raises(IndexError):
        whole[2]
    with pytest.raises(TypeError, match="dataset is generator, wanted one with a length"):
        Indexed(x for x in [1])
