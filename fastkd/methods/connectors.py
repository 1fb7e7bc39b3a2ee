"""What brings a student's map to the form of a teacher's."""

from __future__ import annotations

from torch import nn


def pointwise(width_in: int, width: int, relu: bool = False) -> nn.Sequential:
    """(N, ``width_in``, H, W) -> (N, ``width``, H, W): a 1x1 convolution without bias, batch norm and perhaps a ReLU.

    The convolution's first weights are normal with variance 2 / ``width``.
    """
    convolution = nn.Conv2d(width_in, width, 1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), *[nn.ReLU(inplace=True)] * relu)
