"""Layers that bring a student's map to the shape of a teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def for_convolutions(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W), on a CPU in channels_last: convolutions of few channels take as little as half of
    the time there, and those of 1x1 as little as a fifth.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def averaged(x: Tensor, size: Sequence[int]) -> Tensor:
    """``x`` (N, C, H, W), adaptively averaged to ``size``. For whole multiples of it ``avg_pool2d`` gives the
    same bits in half of the time.
    """
    steps = [mine // wanted for mine, wanted in zip(x.shape[2:], size, strict=True)]
    if all(step * wanted == mine for step, wanted, mine in zip(steps, size, x.shape[2:], strict=True)):
        return F.avg_pool2d(x, steps)
    return F.adaptive_avg_pool2d(x, tuple(size))  # type: ignore[arg-type]


def laid_as(x: Tensor, given: Tensor) -> Tensor:
    """``x``, contiguous if ``given`` is: losses read two maps faster if their memory layouts are the same."""
    return x.contiguous() if given.is_contiguous() else x


def pointwise(width_in: int, width: int, relu: bool = False) -> nn.Sequential:
    """(N, ``width_in``, H, W) -> (N, ``width``, H, W): 1x1 convolution, no bias, batch norm, ReLU if asked.

    The convolution's first weights are normal with variance 2 / ``width``.
    """
    convolution = nn.Conv2d(width_in, width, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), *[nn.ReLU(inplace=True)] * relu)


class ConvReg(nn.Module):
    """FitNet's regressor: a convolution with bias to the teacher's channels and size, batch norm, ReLU.

    ``student``, ``teacher``: (C, H, W). Where the student's size is twice the teacher's, 3x3 of stride 2;
    where it is half of it, a transposed 4x4 of stride 2; where it is larger or equal, a convolution without
    padding of the kernel that fits. Else 3x3, and the result has the student's size.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int], relu: bool = True):
        super().__init__()
        (width_in, *sizes), (width, *targets) = student, teacher
        pairs = [*zip(sizes, targets, strict=True)]
        self.convolution: nn.Module
        if all(s == 2 * t for s, t in pairs):
            self.convolution = nn.Conv2d(width_in, width, 3, stride=2, padding=1)
        elif all(2 * s == t for s, t in pairs):
            self.convolution = nn.ConvTranspose2d(width_in, width, 4, stride=2, padding=1)
        elif all(s >= t for s, t in pairs):
            self.convolution = nn.Conv2d(width_in, width, tuple(1 + s - t for s, t in pairs))  # type: ignore[arg-type]
        else:
            self.convolution = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(width), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x))
        return F.relu(x) if self.relu else x
