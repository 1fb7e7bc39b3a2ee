"""Batch norms and what they answer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastkd import native

compiled = pytest.mark.skipif(not native.CPU.available, reason="needs the CPU library")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def every_path():
    for path in native.cpu_paths():
        native.set_cpu_path(path)
        yield path


def feature(shape, dtype=torch.float32, scale=2.0, shift=1.0):
    # channels of different sizes, so that what is exchanged between them shows
    x = (torch.randn(shape) * scale + shift) * torch.linspace(0.5, 2, shape[1]).view(1, -1, 1, 1)
    return x.to(dtype).to(memory_format=torch.channels_last)


def norms(channels):
    norm = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, copy.deepcopy(norm).double()
