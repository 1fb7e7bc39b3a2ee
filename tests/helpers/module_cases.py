"""Networks for tests of hooks and tracers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastkd.models import create_model

NETWORKS = ["resnet8", "wrn_16_1"]
networks = pytest.mark.parametrize("name", NETWORKS)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def images(n=2):
    return torch.randn(n, 3, 16, 16).to(memory_format=torch.channels_last)


def network(name, train=True):
    """In channels_last, so that the fused batch norm would serve it, with norms that change what passes
    through them.
    """
    model = create_model(name).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.train(train)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halve(model, key):
    module = model.get_submodule(key)
    parametrize.register_parametrization(module, "weight", Halved())
    return model
