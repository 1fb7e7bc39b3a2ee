"""One of two gloo processes of test_autograd.py: a step under DistributedDataParallel against the reference
in one process.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later it would hold the group, whose threads can abort the end
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd import reference


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.Linear(8, 10),
        )

    def forward(self, x):
        a = self.first(x).relu()
        b = self.second(a).relu()
        return [a, b], self.head(b.mean((2, 3)))


def loss(functions, student, teacher, x):
    features, logits = student(x)
    with torch.inference_mode():
        teacher_features, teacher_logits = teacher(x)
    teacher_logits = teacher_logits.clone()
    at = functions.attention_transfer_loss(features, teacher_features, weight=1000.0)
    return at + functions.fsp_loss(features, teacher_features) + functions.kd_loss(logits, teacher_logits)


def main() -> None:
    torch.manual_seed(int(os.environ["SEED"]))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    teacher, alone, images = Student(), Student(), torch.randn(8, 3, 12, 12)
    shared = Student()
    shared.load_state_dict(alone.state_dict())
    parallel = DistributedDataParallel(shared)
    for _ in range(2):  # the second step accumulates
        loss(fastkd, parallel, teacher, images[4 * rank : 4 * rank + 4]).backward()
        (sum(loss(reference, alone, teacher, half) for half in images.split(4)) / 2).backward()
    for ours, exact in zip(shared.parameters(), alone.parameters()):
        torch.testing.assert_close(
            ours.grad, exact.grad, rtol=1e-4, atol=1e-5 * exact.grad.abs().max().item()
        )
    print(f"rank {rank} agrees")
    dist.destroy_process_group()
