"""The accuracy of a network, and where it lies in memory."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from fastkd.data.loader import AnyBatches
from fastkd.models.folding import channels_last
from fastkd.training import collectives

M = TypeVar("M", bound=nn.Module)


def placed(model: M, device: torch.device) -> M:
    """``model`` on ``device``, its convolutions channels_last, in place."""
    channels_last(model.to(device))
    return model


def evaluate(
    model: nn.Module, batches: AnyBatches, autocast: torch.autocast, share: tuple[int, int] = (0, 1)
) -> float:
    """Accuracy in percent over ``batches.test()``, done together by processes of which ``share`` says (which,
    how many).

    The model is left in eval mode.
    """
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=batches.device)
    with torch.no_grad(), autocast:
        for images, labels in batches.test(share):
            counts[0] += (model(images).argmax(1) == labels).sum()
            counts[1] += len(labels)
    if share[1] > 1:
        collectives.add(counts)
    right, seen = counts.tolist()
    return 100 * right / seen
