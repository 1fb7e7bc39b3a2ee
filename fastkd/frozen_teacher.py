"""The teacher: a network that runs without gradients, as a folded copy where that is possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import checks
from fastkd.methods import Output, Points
from fastkd.methods.context import Network
from fastkd.models import Features
from fastkd.models.folding import fold_for_inference
from fastkd.models.observed import Observed


def entered(autocast: torch.autocast | None) -> AbstractContextManager[Any]:
    """``autocast`` as a context; None: a context that leaves autocast as it is where this is entered."""
    return nullcontext() if autocast is None else autocast


class FrozenTeacher(nn.Module):
    """A teacher whose weights no longer change.

    Args:
        network: the teacher. Its parameters need no gradients from here on.
        view: gives its features; None where ``network(x, features=...)`` does.
        mode: "eval", or "train": its batch norms take each batch's own statistics.
        autocast: what it runs under; None: whatever is on where :meth:`ask` is called.
        scale, shift: (C, 1, 1) float32 each: its images are the student's ``images * scale + shift``. None
            where both networks get the same images.

    ``network`` is the teacher as given, ``answering`` the module that is run: the network itself, or the copy
    that :meth:`fold` makes. Callers train neither.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        view: Observed | None,
        mode: str,
        autocast: torch.autocast | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ):
        super().__init__()
        self.network = self.answering = network.requires_grad_(False)
        self.view, self.mode, self.autocast = view, mode, autocast
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def fold(self, points: Points) -> None:
        """Makes the copy that is run, from the present weights: its batch norms are folded into its
        convolutions, and it gives the features ``points``.

        In train mode, and where hooks give the features, the network itself is run.
        """
        if self.mode != "eval" or self.view is not None:
            return
        dtype = None
        with entered(self.autocast):
            kind = next(self.network.parameters()).device.type
            if self.autocast is not None and torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
        self.answering = fold_for_inference(self.network, points.argument, dtype)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """The network is in train mode where ``mode`` and its own mode both say so; the copy never is."""
        self.network.train(mode and self.mode == "train")
        return self

    def ask(self, images: Tensor, points: Points) -> Output:
        """Logits (N, K) and the features ``points`` of images (N, C, H, W), normalized as the student's."""
        images = self.as_wanted(images)
        with torch.no_grad(), entered(self.autocast):
            return points.observe(self.view or self.answering, images)

    def as_wanted(self, images: Tensor) -> Tensor:
        """The student's images (N, C, H, W) as the teacher's are normalized; of the same shape and dtype."""
        if self.scale is None or self.shift is None:
            return images
        scale, shift = self.scale.to(images.device), self.shift.to(images.device)
        return (images * scale + shift).to(images.dtype)

    def features(self, batches: Any) -> Iterator[Features]:
        """The network's own features, ``preact`` included, of each of ``batches``: the student's images, or
        tuples that begin with them.

        Raises TypeError for batches of anything else.
        """
        network: Network = self.view or self.network
        device = next(self.network.parameters()).device
        if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
            raise TypeError(f"train_images is {type(batches).__name__}, wanted batches, as of a DataLoader")
        for i, batch in enumerate(batches):
            images = batch[0] if isinstance(batch, Sequence) and batch else batch
            if not isinstance(images, Tensor) or not images.is_floating_point():
                what = checks.describe(images) if isinstance(images, Tensor) else type(images).__name__
                raise TypeError(
                    f"train_images[{i}] is {what}, wanted images of floating point, or a tuple that begins"
                    " with them"
                )
            with entered(self.autocast):
                features, _ = network(self.as_wanted(images.to(device)), features="both")
            yield features
