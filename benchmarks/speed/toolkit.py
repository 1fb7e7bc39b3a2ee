"""A distillation loop as RepDistiller and its like write it: what a user leaves behind.

Float32, NCHW, images as arrays turned into PIL images and back, a DataLoader, losses in plain PyTorch (FSP by
broadcasting), the teacher in eval mode without gradients, figures read from tensors in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastkd.models import create_model
from speed.formulas import fsp_broadcast

WORKERS = 0
"""Of the DataLoader. On 2 cores none is fastest: 410 images/s of AT, 397, 384 and 390 with one, two and four,
which take cores from the networks.
"""
TEMPERATURE = 4.0


def distance(method: str, student: Any, teacher: Any) -> Tensor:
    """The distillation loss from (features, logits) of both networks, as RepDistiller computes it."""
    if method == "kd":
        p, q = F.log_softmax(student[1] / TEMPERATURE, 1), F.softmax(teacher[1] / TEMPERATURE, 1)
        return 0.9 * F.kl_div(p, q, reduction="sum") * TEMPERATURE**2 / len(p)
    if method == "at":
        maps = [
            [F.normalize(f.pow(2).mean(1).flatten(1)) for f in net[0].stages] for net in (student, teacher)
        ]
        return 1000.0 * torch.stack([(s - t).pow(2).mean() for s, t in zip(*maps)]).sum()
    chains = [[net[0].stem, *net[0].stages] for net in (student, teacher)]
    return fsp_broadcast(*chains)


def loss(method: str, student: Any, teacher: Any, labels: Tensor) -> Tensor:
    share = 0.1 if method == "kd" else 1.0
    return share * F.cross_entropy(student[1], labels) + distance(method, student, teacher)


class Images(Dataset):
    """Random images as CIFAR's arrays, transformed one by one."""

    def __init__(self, count: int):
        from torchvision import transforms

        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(
            0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator
        ).numpy()
        self.labels = torch.randint(10, (count,), generator=generator).tolist()
        mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
        steps = [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
        self.transform = transforms.Compose([*steps, transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def steps(method: str, student_name: str, teacher_name: str, batch: int, count: int) -> Iterator[float]:
    """Training steps without end; each yields the loss."""
    torch.manual_seed(0)
    student, teacher = create_model(student_name), create_model(teacher_name).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(Images(count), batch_size=batch, shuffle=True, num_workers=WORKERS, drop_last=True)
    total = right = seen = 0.0
    student.train()
    while True:
        for images, labels in loader:
            answer = student(images, features=True)
            with torch.no_grad():
                wanted = teacher(images, features=True)
            value = loss(method, answer, wanted, labels)
            total, right, seen = total + value.item(), right + accuracy(answer[1], labels), seen + len(labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            yield total / seen


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top 1 and top 5, as these loops keep them."""
    with torch.no_grad():
        top = logits.topk(5, 1).indices == labels[:, None]
        return top[:, :1].sum().item() + top.sum().item()


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name)
