"""Fused operations as scalars of two features, of which a second derivative is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd

# of a module with the package's functions: fastkd, or its reference
SCALARS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "attention_map": lambda m, x, y: m.attention_map(x).square().sum(),
    "attention_transfer_loss": lambda m, x, y: m.attention_transfer_loss([x, x], [y, y]),
    "fsp_matrix": lambda m, x, y: m.fsp_matrix(x, y).square().sum(),
    "fsp_loss": lambda m, x, y: m.fsp_loss([x, x], [y, y]),
    "tap": lambda m, x, y: sum(v.square().sum() for v in m.tap(x)),
    "relu_tap": lambda m, x, y: sum(v.square().sum() for v in m.relu_tap(x, y)),
}


def refused(function: str, x: Tensor, y: Tensor) -> Tensor:
    """Asserts that a second derivative of ``function`` raises one line that names the reference; returns the
    first derivative.
    """
    (grad,) = torch.autograd.grad(SCALARS[function](fastkd, x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fastkd.reference.{function},") as caught:
        grad.square().sum().backward()
    assert "\n" not in str(caught.value)
    return grad.detach()
