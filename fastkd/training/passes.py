"""One batch for several students: drawn once, and one forward pass of a teacher for all that can share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastkd.distillation import Distillation
from fastkd.methods import Points, union
from fastkd.models.folding import foldable
from fastkd.training.step import Shared
from fastkd.training.trainer import Trainer, Wanted


class Passes:
    """Makes the batches of students that want the same step of the same epoch."""

    def __init__(self) -> None:
        self.epoch: tuple[str, int] | None = None
        self.drawn: Iterator[Any] = iter(())
        self.keys: WeakKeyDictionary[Trainer, tuple[Any, ...]] = WeakKeyDictionary()
        self.askers: dict[tuple[Any, ...], Distillation] = {}  # the one whose folded teacher answers for all
        self.shared: list[list[Trainer]] = []  # of the last batch: those that got one answer

    def batch(self, wanted: Sequence[tuple[Wanted, str | None]]) -> list[Shared]:
        """The next batch for each of ``wanted``, with the fingerprint of its teacher's first weights."""
        trainers = [want.trainer for want, _ in wanted]
        # one that leaves out the last batch draws the same numbers
        batches = max((trainer.batches for trainer in trainers), key=len)
        if self.epoch != (epoch := (batches.stream, wanted[0][0].epoch)):
            self.epoch, self.drawn = epoch, batches.draw(epoch[1])
        drawn = next(self.drawn)
        inputs = batches.inputs(drawn)
        images, answers = inputs[3] if len(inputs) > 3 else inputs[0], dict[Trainer, Any]()
        if len(images):  # of several processes one may have no part of a small batch
            groups = self.grouped(wanted)
            self.shared = list(groups.values())
            for key, group in groups.items():
                answers |= dict.fromkeys(group, self.answer(key, group, images))
        return [Shared(drawn, inputs, answers.get(trainer)) for trainer in trainers]

    def grouped(self, wanted: Sequence[tuple[Wanted, str | None]]) -> dict[tuple[Any, ...], list[Trainer]]:
        """The trainers that have a teacher, grouped so that the teachers of a group give the same bits."""
        groups: dict[tuple[Any, ...], list[Trainer]] = {}
        for (trainer, *_), weights in wanted:
            if trainer.teacher is None:
                continue
            if trainer not in self.keys:  # found by tracing the network
                distillation, whole = trainer.distillation, len(trainer.batches)
                # in train mode the running averages depend on the steps of an epoch
                steps = whole if distillation.teacher_mode == "train" else 0
                self.keys[trainer] = (weights, steps, *answer_key(distillation))
            groups.setdefault(self.keys[trainer], []).append(trainer)
        return groups

    def answer(self, key: tuple[Any, ...], group: Sequence[Trainer], images: Tensor) -> Any:
        """The teacher's output for ``images``, with the features that any of ``group`` reads."""
        asker, points = group[0].distillation, union(each.distillation.points[1] for each in group)
        if asker.teacher_mode == "eval":
            asker = self.askers.get(key, asker)
        if key not in self.askers or points not in asker.points[1]:
            asker.points[1] |= points
            asker.folds = True
            asker.fold()
            self.askers[key] = asker
        answer = asker.ask(images)
        if asker.teacher_mode == "train":
            for other in group:
                copy_buffers(asker.teacher, other.teacher)
        return answer


def answer_key(distillation: Distillation) -> tuple[Any, ...]:
    """Teachers of equal weights and equal keys give the same bits, whichever of their points are asked for
    together: the mode, and the layers that are folded for the features asked for.
    """
    teacher, asked, mode = distillation.teacher, distillation.points[1], distillation.teacher_mode
    if teacher is None or mode == "train":
        return (mode,)
    folded, least = (foldable(teacher, points.argument) for points in (asked, Points.MAPS | Points.PREACT))
    return (mode, *folded, *([] if folded == least else [asked]))


def copy_buffers(source: nn.Module | None, target: nn.Module | None) -> None:
    """Gives ``target`` the buffers of ``source``, such as running averages."""
    if source is not target and source is not None and target is not None:
        for one, other in zip(source.buffers(), target.buffers(), strict=True):
            other.copy_(one)
