"""One student of several teachers: the mean of the losses, or the loss of the mean logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import backends
from fastkd.distillation import Distillation
from fastkd.frozen_teacher import entered
from fastkd.io.console import counted
from fastkd.methods import Batch, Definition, definition_of, undisturbed
from fastkd.methods.sum import Losses

JOINS = ("losses", "logits")


class SeveralTeachers(nn.Module):
    """A :class:`fastkd.Distillation` of several teachers, with the same calls.

        distillation = fastkd.SeveralTeachers(student, [first, second], "kd", join="logits")

    Args:
        teachers: two networks or more, of one number of classes.
        join: "losses": each method is built once per teacher, with layers of its own, and its loss is the
            mean over the teachers. "logits": the methods get the mean of the teachers' logits, so that only
            ``kd`` and ``dkd``, which read nothing else, can be used. With both, the teachers may differ in
            width and family.
        teacher_points, teacher_normalization: as for :class:`fastkd.Distillation`, for all teachers; or a
            list with one such value, or None, per teacher.
        train_images: as there, but read once per teacher, so that no generator will do.
        rest: all other arguments of :class:`fastkd.Distillation`, for all teachers.

    ``terms`` and ``total`` of its losses are the means; ``teacher_logits`` is the mean of the logits. Raises
    ValueError for a method that changes the student, as SimKD and NORM do.
    """

    parts: tuple[Distillation, ...]
    """The distillation of each teacher, all of the one student."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        method: str | Definition = "kd",
        *,
        join: str = "losses",
        options: Mapping[str, Mapping[str, Any]] | None = None,
        preset: str | None = None,
        teacher_points: Sequence[Any] | None = None,
        teacher_normalization: Sequence[Any] | None = None,
        train_images: Iterable[Any] | None = None,
        **rest: Any,
    ):
        super().__init__()
        if not isinstance(teachers, (Sequence, nn.ModuleList)) or isinstance(teachers, str):
            raise TypeError(f"teachers is {type(teachers).__name__}, wanted a list of networks")
        for i, each in enumerate(teachers := list(teachers)):
            if not isinstance(each, nn.Module):
                raise TypeError(f"teachers[{i}] is {type(each).__name__}, wanted a torch.nn.Module")
        if len(teachers) < 2:
            raise ValueError(f"teachers has {counted(len(teachers), 'network')}, wanted at least two")
        if join not in JOINS:
            raise ValueError(f"join is {join!r}, wanted one of {', '.join(JOINS)}")
        if isinstance(train_images, Iterator):
            raise TypeError(
                f"train_images is a {type(train_images).__name__}, which ends after the first teacher: wanted"
                " batches that can be read again, as of a DataLoader"
            )
        self.definition = definition_of(method, preset, options)
        check_join(self.definition, join)
        # in a tuple, which nn.Module does not look into: each holds the student
        given = zip(
            teachers,
            _for_each("teacher_points", teacher_points, len(teachers), _is_list_of_points),
            _for_each("teacher_normalization", teacher_normalization, len(teachers), _is_pair),
            strict=True,
        )
        self.parts = tuple(
            Distillation(
                student,
                teacher,
                self.definition,
                teacher_points=points,
                teacher_normalization=normalization,
                train_images=train_images,
                **rest,
            )
            for teacher, points, normalization in given
        )
        self.student, self.join = student, join
        self.methods = nn.ModuleList(part.methods for part in self.parts[: 1 if join == "logits" else None])
        first = self.parts[0]
        self.names, self.points, self.teacher_mode = self.definition.names, first.points, first.teacher_mode
        self.image_shape, self.teacher_image_shape = first.image_shape, first.teacher_image_shape
        self.notes = list(dict.fromkeys(text for part in self.parts for text in part.notes))
        counts = [int(self._logits_of(part).shape[1]) for part in self.parts]
        if len(set(counts)) > 1:
            raise ValueError(f"teachers have {', '.join(map(str, counts))} classes, wanted the same number")

    @property
    def teacher(self) -> nn.ModuleList:
        """The teachers, which are not in ``modules()``, ``parameters()`` or ``state_dict()``."""
        return nn.ModuleList(part.teacher for part in self.parts if part.teacher is not None)

    def fold(self) -> None:
        """See :meth:`fastkd.Distillation.fold`."""
        for part in self.parts:
            part.fold()

    def train(self, mode: bool = True) -> SeveralTeachers:
        super().train(mode)
        for part in self.parts:
            part.train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SeveralTeachers:
        super()._apply(fn, recurse)
        for part in self.parts:
            part._apply(fn, recurse)
        return self

    def settled(self) -> dict[str, Any]:
        """See :meth:`fastkd.Distillation.settled`. Raises ValueError where the teachers disagree."""
        found = [part.settled() for part in self.parts[: len(self.methods)]]
        for key, value in found[0].items():
            values = [each[key] for each in found]
            if any(other != value for other in values):
                told = ", ".join(map(str, values))
                raise ValueError(f"option {key} is left open, the teachers decide {told}: give it")
        return found[0]

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """See :meth:`fastkd.Distillation.set_epoch`."""
        for part in self.parts:
            part.set_epoch(epoch, epochs)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        teacher_images: Tensor | None = None,
    ) -> Losses:
        first, batch = self.parts[0], Batch(images, labels, index)
        answers = [part.ask(images if teacher_images is None else teacher_images) for part in self.parts]
        with entered(first.autocast):
            student = first._students(images)
        losses = first.methods.cross_entropy(student.logits, labels)
        student, teachers = first._as_seen(student), [first._as_seen(answer) for answer in answers]
        logits = torch.stack([teacher.logits for teacher in teachers]).mean(0)
        records: dict[str, Any] = {}
        if self.join == "logits":
            mean = teachers[0]._replace(logits=logits)
            found, records = first.methods.losses(batch, student, mean, entered(first.autocast))
            losses.update(found)
        else:
            each = []
            for i, (part, teacher) in enumerate(zip(self.parts, teachers, strict=True)):
                found, own = part.methods.losses(batch, student, teacher, entered(part.autocast))
                each.append(found)
                records.update({f"{i}.{name}": record for name, record in own.items()})
            losses.update({name: torch.stack([found[name] for found in each]).mean() for name in each[0]})
        return Losses(torch.stack(list(losses.values())).sum(), losses, student.logits, logits, records)

    @torch.no_grad()
    def update(self, index: Tensor, records: Mapping[str, Any]) -> None:
        """See :meth:`fastkd.Distillation.update`."""
        for key, record in records.items():
            place, point, name = key.partition(".")
            part = self.parts[int(place) if point else 0]
            part.update(index, {name if point else key: record})

    def check(self, images: int = 2) -> dict[str, list[backends.Call | backends.KernelCall]]:
        """See :meth:`fastkd.Distillation.check`."""
        calls: dict[str, list[backends.Call | backends.KernelCall]] = {}
        for part in self.parts:
            for name, found in part.check(images).items():
                calls[name] = calls.get(name, []) + found
        return calls

    def _logits_of(self, part: Distillation) -> Tensor:
        blank = next(self.student.parameters()).new_zeros(1, *self.teacher_image_shape)
        teacher: Any = part.teacher
        with undisturbed(teacher):
            found: Tensor = teacher(blank)
        return found


def _for_each(name: str, given: Any, teachers: int, of_one: Callable[[Any], bool]) -> Sequence[Any]:
    """``given`` as one value per teacher. ``of_one(given)``: whether it is a single value, for all."""
    if given is None or isinstance(given, str) or not isinstance(given, Sequence) or of_one(given):
        return [given] * teachers
    if len(given) != teachers:
        raise ValueError(
            f"{name} has {counted(len(given), 'value')}, and there are {teachers} teachers: wanted one for"
            " all of them, or a list with one for each"
        )
    return given


def _is_list_of_points(given: Sequence[Any]) -> bool:
    """Whether its elements are points: names, or pairs of a name and a function."""
    return all(isinstance(x, str) or (isinstance(x, tuple) and callable(x[-1:] and x[-1])) for x in given)


def _is_pair(given: Sequence[Any]) -> bool:
    """Whether it is a (mean, deviation), each a sequence of numbers, and not one such pair a teacher."""
    return len(given) == 2 and not any(
        x is None or (isinstance(x, (tuple, list)) and x and isinstance(x[0], (tuple, list, Tensor)))
        for x in given
    )


def kept_bytes(distillation: Distillation | SeveralTeachers) -> dict[str, int]:
    """What each method keeps in buffers, for all teachers together."""
    methods, found = distillation.methods, dict[str, int]()
    sums: Any = methods if isinstance(methods, nn.ModuleList) else [methods]
    for each in sums:
        for name, module in each.items():
            found[name] = found.get(name, 0) + sum(buffer.nbytes for buffer in module.buffers())
    return found


def check_join(definition: Definition, join: str) -> None:
    """Raises ValueError where a method of the sum cannot have several teachers."""
    if not definition.terms:
        raise ValueError(f"method {definition.name!r} has no teacher, but several are given")
    if definition.wraps:
        raise ValueError(f"method {definition.name!r} changes the student, so it can have one teacher only")
    features = [term.name for term in definition.terms if not term.kind.reads_logits_alone]
    if join == "logits" and features:
        raise ValueError(
            f"join is 'logits', but {features[0]} reads more of a teacher than its logits, wanted 'losses'"
        )
