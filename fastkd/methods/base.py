"""What a distillation method is: a :class:`Distiller`, which sees both networks once, then batches."""

from __future__ import annotations

import enum
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastkd.methods.context import BuildContext as BuildContext  # every method names it beside Distiller
from fastkd.methods.context import Network
from fastkd.models import Features


class Points(enum.Flag):
    """Which features a method reads of a network. Logits, pooled vector and final map are always there."""

    NONE = 0
    MAPS = enum.auto()  # stem, stages, blocks
    PREACT = enum.auto()  # preact.stages, preact.blocks: the maps before the ReLU

    @property
    def argument(self) -> bool | str:
        """What a network's ``forward`` gets as ``features`` for them."""
        known: dict[Points, bool | str] = {Points.NONE: "pooled", Points.MAPS: True, Points.PREACT: "preact"}
        return known.get(self, "both")

    def observe(self, network: Network, images: Tensor) -> Output:
        """One forward pass of ``network``, with these features and no others."""
        features, logits = network(images, features=self.argument)
        if self is Points.PREACT:
            features = features._replace(stem=(), stages=(), blocks=(), maps=(), preact=features)  # type: ignore[arg-type]
        return Output(logits, features)


def union(points: Iterable[Points]) -> Points:
    """All that any of ``points`` asks for."""
    return functools.reduce(operator.or_, points, Points.NONE)


class Batch(NamedTuple):
    """Images (N, 3, H, W) as the networks get them, labels (N,) or None, and ``index`` (N,) or None.

    ``index`` is each image's place in the training set in use: 0 to len(train_labels) - 1, in a subset too.
    """

    images: Tensor
    labels: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]  # in place of the method of tuples


class Output(NamedTuple):
    """One network's answer to a batch."""

    logits: Tensor
    features: Features


def paired_stages(
    method: str, student: Sequence[Any], teacher: Sequence[Any], same: str = "", first: int = 1
) -> list[tuple[Any, Any]]:
    """The shapes (C, H, W) of both networks' stages, side by side; ``first`` is the number of the first.

    ``same``: "size" or "channels", what must be equal in a pair. Raises ValueError, which names both shapes.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} stages, teacher has {len(teacher)}: {method} wanted the same number"
        )
    wanted = {
        "size": (slice(1, None), "maps of one size"),
        "channels": (slice(1), "equal channels, or adapter=1x1"),
    }
    pairs = list(zip(student, teacher, strict=True))
    for i, (mine, theirs) in enumerate(pairs, first):
        if same and mine[wanted[same][0]] != theirs[wanted[same][0]]:
            raise ValueError(
                f"student's stage {i} is {tuple(mine)}, teacher's is {tuple(theirs)}: {method} wanted"
                f" {wanted[same][1]}"
            )
    return pairs


class Beside(NamedTuple):
    """Weights of cross-entropy and of KD that a method is trained with, beside its own loss."""

    ce: float = 1.0
    kd: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A published variant: values of the method's options, what is trained beside its loss, and fields of the
    recipe that it changes.

    ``with_kd``: what stands beside the loss in the sum with KD, where its authors published that too.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Beside = Beside(1.0, 0.0)  # noqa: RUF009 - a tuple
    with_kd: Beside | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a method's ``Options``: its default, its help text, and the values that it may have."""
    return field(default=default, metadata={"help": text, "choices": choices})


class Distiller(nn.Module):
    """One distillation loss with all that it learns and keeps. Parameters are trained with the student's,
    buffers are in the checkpoint.

    A method is one file in ``fastkd/methods/`` with one subclass; the file's name is the method's. It is
    built with PyTorch's generator set for (seed, the method's name), so its first weights do not depend on
    its neighbours in a sum.
    """

    @dataclass(frozen=True)
    class Options:
        """The method's knobs, each with :func:`option`. ``--option NAME.FIELD=VALUE`` sets one."""

    title: ClassVar[str]  # in tables and curves
    colour: ClassVar[str] = "#000000"
    presets: ClassVar[Mapping[str, Preset]]
    canonical: ClassVar[str]  # the preset that stands in where a recipe's authors lack the method
    student_points: Points = Points.NONE
    teacher_points: Points = Points.NONE
    whole_batches: ClassVar[bool] = False  # a short last batch is dropped
    reads_logits_alone: ClassVar[bool] = False  # so that the mean of several teachers' logits may stand in
    # options left open whose value the networks decide: a run writes them into its row
    settled: Mapping[str, Any] = {}
    initializes: ClassVar[bool] = False  # what :meth:`begins` says

    def __init__(self, context: BuildContext, options: Any):
        super().__init__()

    @classmethod
    def beside(cls, options: Any, preset: Preset, with_kd: bool) -> Beside:
        """The weights of cross-entropy and KD beside this loss; ``with_kd``: whether the user asks for KD.

        ``preset.with_kd`` is None except in a sum of this method and KD alone, under the recipe's own preset.
        """
        return preset.with_kd if with_kd and preset.with_kd is not None else preset.beside

    @classmethod
    def begins(cls, options: Any) -> bool:
        """Whether it is trained alone in a first phase, and only there, if the recipe has ``init_epochs``."""
        return cls.initializes

    def wrap_student(self, student: nn.Module) -> nn.Module:
        """The network that is trained, tested, counted and saved: ``student``, changed or not. One method of
        a sum may change it.
        """
        return student

    def logits(self, z: Tensor) -> Tensor:
        """Applied to both networks' logits, float32, before cross-entropy and every loss of the sum."""
        return z

    def connect(self, batch: Batch, student: Output, teacher: Output) -> Any:
        """What runs under autocast, such as convolutions of features; :meth:`loss` gets its result."""
        return None

    def loss(
        self, batch: Batch, student: Output, teacher: Output, connected: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss, a scalar times its published weight, or (loss, record). Runs outside autocast.

        A record is a tensor or a tuple of tensors, one row an image, without gradients; :meth:`update` gets
        it after the step.
        """
        raise NotImplementedError

    def weight_at(self, epoch: int, epochs: int) -> float:
        """A factor on the loss in ``epoch`` (from 0) of ``epochs``; schedules are fractions of the run."""
        return 1.0

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Called before the first step of ``epoch`` (from 0), for numbers drawn from the seed and the epoch.

        The seed is ``torch.initial_seed()`` in ``__init__``. What a graph reads must be a buffer that is
        changed in place.
        """

    def update(self, index: Tensor, record: Any) -> None:
        """Called after the optimizer's step, without gradients; ``index`` and ``record`` have the rows of all
        processes.
        """


def overrides(cls: type[Distiller], name: str) -> bool:
    """Whether the method ``cls`` overrides ``Distiller.name``."""
    return getattr(cls, name) is not getattr(Distiller, name)
