"""The accuracy of a network, a check of its logits, and its memory format."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from fastkd.data.loader import AnyBatches
from fastkd.errors import UserError, one_line
from fastkd.models.folding import channels_last
from fastkd.training import collectives

M = TypeVar("M", bound=nn.Module)


def placed(model: M, device: torch.device) -> M:
    """``model`` on ``device``, its convolutions channels_last, in place."""
    channels_last(model.to(device))
    return model


def check_logits(model: nn.Module, images: Tensor, classes: int, name: str) -> None:
    """Raises UserError, which begins with ``name``, unless ``model`` gives logits (N, ``classes``) for
    ``images`` (N, C, H, W). The model is left in eval mode.
    """
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # whatever a network does with images that it is not made for
        why = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UserError(f"{name} does not take images {tuple(images.shape[1:])} ({why})") from None
    count = len(images)
    told = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if told != (count, classes):
        raise UserError(f"{name} gives {told} for {count} images, wanted {(count, classes)}")


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
