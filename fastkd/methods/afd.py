"""Attention-based feature distillation (Ji, Heo and Park, 2021): which block of the student follows which of
the teacher is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.models import Features, ResNet, WideResNet
from fastkd.ops.attention import attention_map
from fastkd.reference.common import widen

_RESNET110 = 54  # blocks


class Attention(nn.Module):
    """(student maps, teacher maps) -> (N, T, S), the weights of the student's maps for each of the teacher's;
    they add up to 1.

    A map's mean over space gives, by a linear layer and batch norm, the query of a teacher's map and, with a
    ReLU, the key of a student's. One more linear layer and batch norm, over the rows of all keys together,
    make a key for each pair. The softmax is over the inner products of keys and queries and of learned
    positions, divided by the root of ``width``.
    """

    def __init__(self, students: Sequence[int], teachers: Sequence[int], width: int):
        super().__init__()
        self.width = width
        self.queries = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.BatchNorm1d(width)) for size in teachers
        )
        self.keys = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.BatchNorm1d(width), nn.ReLU()) for size in students
        )
        pairs = width * len(teachers)
        self.bilinear = nn.Sequential(nn.Linear(width, pairs), nn.BatchNorm1d(pairs))
        self.p_t, self.p_s = (nn.Parameter(torch.empty(len(side), width)) for side in (teachers, students))
        nn.init.xavier_normal_(self.p_t)
        nn.init.xavier_normal_(self.p_s)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        queries, keys = _vectors(self.queries, teachers), _vectors(self.keys, students)
        pairs = self.bilinear(keys.flatten(0, 1)).view(*keys.shape[:2], len(teachers), self.width)
        scores = torch.einsum("nstd,ntd->nts", pairs, queries) + self.p_t @ self.p_s.T
        return (scores / self.width**0.5).softmax(2)


def _vectors(layers: nn.ModuleList, maps: Sequence[Tensor]) -> Tensor:
    """(N, number of maps, width)"""
    return torch.stack([layer(widen(x)[0].mean((2, 3))) for layer, x in zip(layers, maps, strict=True)], 1)


def differences(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """(N, T, S): mean squared differences of attention maps, mean of squares over channels, of length 1.

    A student's map is averaged to the teacher's size after the squaring; a smaller one is repeated.
    """
    energies = [attention_map(x, normalize=False) for x in students]
    resized: dict[tuple[int, int], Tensor] = {}  # (N, S, positions), by the teacher's size
    found = []
    for teacher in teachers:
        size = (teacher.shape[2], teacher.shape[3])
        if size not in resized:
            maps = [
                (x if x.shape[1:] == size else F.adaptive_avg_pool2d(x, size)).flatten(1) for x in energies
            ]
            resized[size] = F.normalize(torch.stack(maps, 1), dim=2)
        target = attention_map(teacher).flatten(1)
        found.append((resized[size] - target[:, None]).square().mean(2))
    return torch.stack(found, 1)


class AFD(Distiller):
    """``beta`` times the differences of all pairs of a student's and a teacher's block, by learned weights.

    The maps are the outputs of every residual block after a ReLU, which in a wide ResNet follows the next
    batch norm; of a ResNet-110 those of every second one. The stem takes no part. Summed over the teacher's
    blocks. With KD of weight 0.9.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(200.0, "factor of the loss")
        width: int = option(128, "of queries and keys")

        def __post_init__(self) -> None:
            if self.width < 1:
                raise ValueError(f"width is {self.width}, wanted at least 1")

    title, colour = "AFD", "#999933"
    canonical = "afd"
    presets = {"afd": Preset({"beta": 200.0, "width": 128}, Beside(1.0, 0.9))}

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.beta = options.beta
        self.is_wide = [isinstance(network, WideResNet) for network in (context.student, context.teacher)]
        self.student_points, self.teacher_points = (
            Points.PREACT if wide else Points.MAPS for wide in self.is_wide
        )
        shapes = (context.student_shapes.blocks, context.teacher_shapes.blocks)
        networks = (context.student, context.teacher)
        self.every_second = [
            isinstance(x, ResNet) and len(y) == _RESNET110 for x, y in zip(networks, shapes, strict=True)
        ]
        chosen = [
            blocks[1::2] if second else blocks
            for blocks, second in zip(shapes, self.every_second, strict=True)
        ]
        students, teachers = ([int(shape[0]) for shape in side] for side in chosen)
        if not students or not teachers:
            raise ValueError(
                f"student shows {len(students)} blocks and teacher {len(teachers)}: afd wanted at least one"
                " of each, name submodules"
            )
        self.attention = Attention(students, teachers, options.width)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        students, teachers = self.blocks(student.features, 0), self.blocks(teacher.features, 1)
        return (
            self.beta
            * (self.attention(students, teachers) * differences(students, teachers)).sum((1, 2)).mean()
        )

    def blocks(self, features: Features, role: int) -> list[Tensor]:
        """The maps of the student (0) or the teacher (1)."""
        found = [F.relu(x) for x in features.preact.blocks] if self.is_wide[role] else list(features.blocks)
        return found[1::2] if self.every_second[role] else found
