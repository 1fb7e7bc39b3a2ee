"""Features and calls that the tests of the CUDA library share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import make
from torch import Tensor

import fastkd

CIFAR = ((16, 16, 16), (32, 8, 8), (9, 4, 4))
PRECISIONS = ("ieee", "tf32", "tf32x3")


def chains(
    place: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    batch: int = 3,
) -> list[list[Tensor]]:
    """Three stages of a student, which want gradients, and of a teacher."""
    shapes = ((4, 9), (8, 7), (16, 4))
    return [
        [place(make((batch, c, n, n), dtype, layout)).requires_grad_(not i) for c, n in shapes]
        for i in (0, 1)
    ]


def step(s: list[Tensor], t: list[Tensor], **switches: Any) -> list[Tensor]:
    """Both losses and a tap, and the student's gradients.

    Without their history: while that lives, gradients of later steps wait on the stream of this one.
    """
    loss = fastkd.attention_transfer_loss(s, t, **switches) + fastkd.fsp_loss(s, t)
    y, attention = fastkd.relu_tap(s[0], t[0])
    grads = torch.autograd.grad(loss + attention[:, 3].sum() + y.sum(), s)
    return [loss.detach(), y.detach(), attention.detach(), *grads]
