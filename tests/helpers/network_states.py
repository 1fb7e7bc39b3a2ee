"""States of networks for comparisons."""

from __future__ import annotations

import torch

from fastkd.models import create_model


def worn_in(name: str, **options) -> torch.nn.Module:
    """A model in float64 whose batch norms are no longer what they were initialized to."""
    model = create_model(name, **options).double()
    for key, value in model.state_dict().items():
        if "running_var" in key or ("bn" in key and key.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif "running_mean" in key or ("bn" in key and key.endswith("bias")):
            value.normal_(0, 0.3)
    return model.eval()
