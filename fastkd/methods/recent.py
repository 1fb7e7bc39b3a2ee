"""Contrastive distillation without a bank: against the latest embeddings, or against those of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.ops.crd import crd_loss


class Recent(nn.Module):
    """``forward(student, teacher)``: unit embeddings (N, D) twice -> (scalar, normalizers (2,)).

    ``fastkd.crd_loss`` where the positive of an image is the other network's embedding of it in this very
    step. The negatives are that network's latest embeddings of ``length`` images or, for length 0, those of
    the other images of the batch; images of the same class may be among them. The queues begin as random
    numbers, and :meth:`update` replaces the oldest rows after the optimizer's step. The bank of the formula
    consists of the batch and the queue.
    """

    student_queue: Tensor
    teacher_queue: Tensor
    place: Tensor
    normalizers: Tensor

    def __init__(self, length: int, width: int, temperature: float, weight: float):
        super().__init__()
        self.length, self.temperature, self.weight = length, temperature, weight
        for name in ("student_queue", "teacher_queue"):
            self.register_buffer(name, nn.functional.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))  # of the oldest row
        self.register_buffer("normalizers", torch.zeros(2))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        count = len(student)
        mine, others = torch.arange(count, device=student.device)[:, None], self.length or count - 1
        if not others:
            raise ValueError(
                "images has 1 of them, wanted at least 2: crd.negatives=batch are the other images"
            )
        negatives = torch.arange(others, device=student.device) + count
        if not self.length:
            negatives = (mine + 1 + negatives - count) % count
        banks = [
            torch.cat([x.detach(), queue.to(x.dtype)])
            for x, queue in ((student, self.student_queue), (teacher, self.teacher_queue))
        ]
        rows = torch.cat([mine, negatives.expand(count, -1)], 1)
        return crd_loss(
            student,
            teacher,
            banks[0],
            banks[1],
            rows,
            temperature=self.temperature,
            normalizers=self.normalizers,
            weight=self.weight,
        )

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, normalizers: Tensor) -> None:
        """The embeddings of all processes together; ``normalizers`` are taken where there are none yet."""
        self.normalizers.copy_(torch.where(self.normalizers > 0, self.normalizers, normalizers))
        if not self.length:
            return
        student, teacher = student[-self.length :], teacher[-self.length :]
        places = (self.place + torch.arange(len(student), device=student.device)) % self.length
        self.student_queue[places] = student.to(self.student_queue.dtype)
        self.teacher_queue[places] = teacher.to(self.teacher_queue.dtype)
        self.place.copy_((self.place + len(student)) % self.length)
