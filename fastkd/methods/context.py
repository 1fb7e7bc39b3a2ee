"""What a method sees of the two networks before the first step: their shapes and parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _private
from fastkd.models import Features
from fastkd.models.exchange import Parts
from fastkd.models.observed import Observed

Network = Callable[..., tuple[Features, Tensor]]
"""A network of ``fastkd.models``, or another that is observed: ``network(images, features=...)``."""


@dataclass(frozen=True)
class BuildContext:
    """What a method may read when it is built. It copies what it needs and stores no network.

    ``student`` and ``teacher`` are as built: not folded, not wrapped for several GPUs; the teacher is frozen
    and holds its weights. ``student_shapes`` and ``teacher_shapes`` are Features of torch.Size (C, H, W),
    ``preact`` included. ``train_labels`` are those of the training set in use, or None; their number is the
    size of a bank. ``batch_size`` counts the images of ONE process in a step. ``teacher_features()``, if it
    is not None, goes once through the training images and gives the teacher's features, ``preact`` included,
    batch by batch. ``student_view`` and ``teacher_view`` give the features of a network that is not of
    ``fastkd.models``. ``class_counts``: the numbers of logits of student and teacher.
    """

    student: nn.Module
    teacher: nn.Module
    student_shapes: Features
    teacher_shapes: Features
    num_classes: int
    train_labels: Tensor | None = None
    batch_size: int | None = None
    epochs: int | None = None
    image_shape: tuple[int, ...] = (3, 32, 32)
    teacher_features: Callable[[], Iterator[Features]] | None = None
    student_view: Observed | None = None
    teacher_view: Observed | None = None
    class_counts: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        image_shape: tuple[int, ...] = (3, 32, 32),
        observed: tuple[Observed | None, Observed | None] = (None, None),
        *,
        teacher_image_shape: tuple[int, ...] | None = None,
        **rest: Any,
    ) -> BuildContext:
        """Finds the shapes, and the number of classes unless given, in one forward pass of each network.

        ``observed``: the views of networks that do not return features themselves.
        ``teacher_image_shape``: given where the teacher's images have another shape than the student's.
        """
        found = [
            shapes(student, image_shape, observed[0]),
            shapes(teacher, teacher_image_shape or image_shape, observed[1]),
        ]
        if rest.get("num_classes") is None:
            rest["num_classes"] = found[1][1]
        rest["class_counts"] = found[0][1], found[1][1]
        rest.update(student_view=observed[0], teacher_view=observed[1])
        return cls(student, teacher, found[0][0], found[1][0], image_shape=image_shape, **rest)

    def with_student(self, student: nn.Module) -> BuildContext:
        view = self.student_view
        if view is not None:
            with undisturbed(student):
                view = view.refreshed()
        found = shapes(student, self.image_shape, view)[0]
        return dataclasses.replace(self, student=student, student_shapes=found, student_view=view)

    def same_classes(self, method: str) -> None:
        """Raises ValueError where a method that compares logits would get different numbers of them."""
        if self.class_counts is not None and len({*self.class_counts}) > 1:
            mine, theirs = self.class_counts
            raise ValueError(
                f"student has {mine} classes, teacher has {theirs}: {method} compares logits, wanted as many"
            )

    def student_parts(self) -> Parts:
        """Where the student's neck and classifier are. Raises ValueError where it has none."""
        return Parts("fc") if self.student_view is None else self.student_view.parts()

    def teacher_classifier(self, method: str) -> nn.Linear:
        """The linear layer that the teacher's pooled vector goes to. Raises ValueError."""
        name = "fc" if self.teacher_view is None else self.teacher_view.classifier
        width = self.teacher_shapes.pooled[0]
        found = dict(self.teacher.named_modules()).get(str(name))
        if not isinstance(found, nn.Linear) or found.in_features != width:
            raise ValueError(
                f"teacher is {type(self.teacher).__name__} without a Linear for its {width} numbers:"
                f" {method} wanted a classifier, by its name in the argument classifier"
            )
        return found

    def teacher_norms(self) -> tuple[nn.Module, ...]:
        """The batch norm before the ReLU of each of the teacher's stages. Raises ValueError."""
        owner: Any = self.teacher if self.teacher_view is None else self.teacher_view
        return tuple(getattr(owner, "norms_before_relu", tuple)())


@contextmanager
def undisturbed(*networks: nn.Module) -> Iterator[None]:
    """The networks are in eval mode and have no gradients inside; afterwards each module is in the mode that
    it was in.
    """
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def shapes(
    network: nn.Module, image_shape: tuple[int, ...], observed: Network | None = None
) -> tuple[Features, int]:
    """(Features of each map's size without the batch, number of logits), from two blank images."""
    with undisturbed(network):
        images = next(network.parameters()).new_zeros(2, *image_shape)
        features, logits = (observed or network)(images, features="both")
    return (
        _private.map_tensors(lambda x: x.shape[1:] if isinstance(x, Tensor) else x, features),
        logits.shape[1],
    )
