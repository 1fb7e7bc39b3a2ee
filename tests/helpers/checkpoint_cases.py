"""Files with the weights of a small network."""

from __future__ import annotations

import pytest
import torch

from fastkd.models import create_model

formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def network():
    """Its batch norms have seen a batch."""
    model = create_model("resnet8", 10)
    model(torch.randn(4, 3, 32, 32))
    return model


def same(model, source):
    return all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    )
