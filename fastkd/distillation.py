"""Student, teacher and method as one module: from a batch to its loss. The training script drives the same
one that users build.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _private, backends, checks, errors
from fastkd.frozen_teacher import FrozenTeacher, entered
from fastkd.methods import Batch, BuildContext, Definition, Distiller, Output, definition_of, undisturbed
from fastkd.methods.sum import Losses, MethodSum
from fastkd.models.extract import Point
from fastkd.models.normalization import Normalization, renormalized
from fastkd.models.observed import Observed, image_shape_of, views


class Distillation(nn.Module):
    """``forward(images, labels=None, index=None) -> Losses``, for a loop of your own:

        distillation = fastkd.Distillation(student, teacher, "at+kd")
        optimizer = torch.optim.SGD(distillation.parameters(), 0.05)
        for epoch in range(epochs):
            distillation.train()
            distillation.set_epoch(epoch, epochs)
            for images, labels in loader:
                optimizer.zero_grad()
                losses = distillation(images, labels)
                losses.total.backward()
                optimizer.step()

    Its parameters are the student's, then those of the methods; ``student`` is what is tested and saved. The
    teacher is frozen and moves with ``.to()``, but is not in ``modules()``, ``parameters()`` or
    ``state_dict()``. In eval mode a copy of it is run, whose batch norms are folded into its convolutions:
    load its weights before, or call :meth:`fold` after.

    Args:
        student, teacher: networks of ``fastkd.models``, or any others; the teacher may be None where the
            method is "baseline".
        method: a name of ``fastkd.methods.METHODS``, or several with "+" between them, or what
            ``fastkd.methods.define`` returns.
        options, preset: see ``fastkd.methods.define``; only beside a name.
        student_points, teacher_points: names of submodules (of ``named_modules()``), in the order of the
            forward pass, whose outputs are the ``stages`` of a network that is not of ``fastkd.models``; or
            pairs of a name and a function of the output, as for :func:`fastkd.extract`. ``pooled`` is then
            the input of its last ``nn.Linear``, ``final`` the map whose mean that is, and FSP's pairs are
            consecutive stages. Such a teacher is not folded.
        classifier: the name of the module whose input is ``pooled``, if it is not the last ``nn.Linear``. It
            holds for each network that has such a module and is not of ``fastkd.models``. Or a pair: the
            student's and the teacher's.
        train_labels: (M,) int64, the labels of the training set, for methods that keep something of each
            image; ``index`` in ``forward`` are positions in it.
        train_images: the training set in batches, of images or of tuples that begin with them, such as a
            DataLoader, for methods that look at it once when they are built.
        num_classes: by default the number of the teacher's logits.
        batch_size, epochs: of the training, for methods whose layers or schedules depend on them.
        autocast: what the networks and the methods' convolutions run under; None: whatever is on where
            ``forward`` is called. The losses themselves never run under autocast.
        teacher_mode: "eval", or "train": its batch norms take each batch's own statistics.
        seed: the methods' first weights depend on it and on the method's name.
        fold: whether a teacher in eval mode is folded.
        image_shape: (C, H, W) of the images; None: what one of the networks is built for, else (3, 32, 32).
        teacher_image_shape: (C, H, W) of ``teacher_images``, where ``forward`` gets them.
        normalization, teacher_normalization: (mean, std), one number per channel, by which the images are
            normalized, and by which the teacher expects them. Where they differ, the teacher gets
            ``(images * std + mean - teacher_mean) / teacher_std``.

    ``forward`` takes images (N, C, H, W), labels (N,) int64 or None (no cross-entropy then) and, for methods
    that need it, ``index`` (N,) int64. ``teacher_images``: the same images for the teacher, where it takes
    another size; ``taught``: what :meth:`ask` returned for them. It is one graph under
    ``torch.compile(fullgraph=True)``. Raises TypeError for an argument of the wrong kind, ValueError for an
    unknown method or option, and for networks that do not fit the method.
    """

    methods: MethodSum
    views: tuple[Observed | None, Observed | None]
    """What gives the features of student and teacher; None for a network of ``fastkd.models``."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: str | Definition = "at",
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        preset: str | None = None,
        student_points: Sequence[Point] | None = None,
        teacher_points: Sequence[Point] | None = None,
        classifier: str | tuple[str | None, str | None] | None = None,
        train_labels: Tensor | None = None,
        train_images: Iterable[Any] | None = None,
        num_classes: int | None = None,
        batch_size: int | None = None,
        epochs: int | None = None,
        autocast: torch.autocast | None = None,
        teacher_mode: str = "eval",
        seed: int = 0,
        fold: bool = True,
        image_shape: tuple[int, ...] | None = None,
        teacher_image_shape: tuple[int, ...] | None = None,
        normalization: Normalization | None = None,
        teacher_normalization: Normalization | None = None,
    ):
        super().__init__()
        checks.distillation(
            student,
            teacher,
            classifier=classifier,
            image_shape=image_shape,
            teacher_image_shape=teacher_image_shape,
            autocast=autocast,
            teacher_mode=teacher_mode,
            num_classes=num_classes,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
        )
        self.definition = definition_of(method, preset, options)
        self.views = (None, None)
        self.autocast, self.teacher_mode, self.batch_size = autocast, teacher_mode, batch_size
        image_shape = image_shape_of(student, teacher) if image_shape is None else image_shape
        self.image_shape, self.teacher_image_shape = image_shape, teacher_image_shape or image_shape
        scale, shift = renormalized(normalization, teacher_normalization, self.teacher_image_shape)
        distillers: dict[str, Distiller] = {}
        # in a tuple, which nn.Module does not look into
        self._frozen: tuple[FrozenTeacher, ...] = ()
        if self.definition.needs_teacher:
            if teacher is None:
                raise ValueError(
                    f"teacher is None, wanted a network: method {self.definition.name!r} learns from one"
                )
            points = student_points, teacher_points
            with undisturbed(student, teacher):
                image_shapes = image_shape, self.teacher_image_shape
                self.views = views((student, teacher), points, classifier, image_shapes)
                frozen = FrozenTeacher(teacher, self.views[1], teacher_mode, autocast, scale, shift)
                context = BuildContext.of(
                    student,
                    teacher,
                    image_shape,
                    self.views,
                    teacher_image_shape=self.teacher_image_shape,
                    # a method may look at the teacher's features while it is built
                    teacher_features=None if train_images is None else partial(frozen.features, train_images),
                    train_labels=train_labels,
                    num_classes=num_classes,
                    batch_size=batch_size,
                    epochs=epochs,
                )
                distillers, student = self.definition.build(context, seed)
            if distillers:
                self._frozen = (frozen,)
            if self.definition.wraps and self.views[0] is not None:
                with undisturbed(student):
                    self.views = self.views[0].refreshed(), self.views[1]
        self.student = student
        self.methods = MethodSum(distillers, self.definition).to(next(student.parameters()).device)
        self.names = self.definition.names
        self.points = [
            self.methods.points("student", self.views[0], student_points),
            self.methods.points("teacher", self.views[1], teacher_points),
        ]
        told = [
            view.misordered() for view, asked in zip(self.views, self.points, strict=True) if view and asked
        ]
        self.notes = [text for text in told if text is not None]
        for text in self.notes:
            errors.warn_once(text)
        self.folds = fold
        self.fold()
        self._set_teachers_mode()

    @property
    def teacher(self) -> nn.Module | None:
        return self._frozen[0].network if self._frozen else None

    def fold(self) -> None:
        """Makes the folded copy of the teacher again, if there is one: after its weights changed in place."""
        if self.folds:
            for frozen in self._frozen:
                frozen.fold(self.points[1])

    def train(self, mode: bool = True) -> Distillation:
        """As in ``nn.Module``; the teacher follows only where ``teacher_mode`` is "train"."""
        super().train(mode)
        self._set_teachers_mode()
        return self

    def _set_teachers_mode(self) -> None:
        for frozen in self._frozen:
            frozen.train(self.training)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Distillation:
        super()._apply(fn, recurse)
        for frozen in self._frozen:
            frozen._apply(fn, recurse)
        return self

    def settled(self) -> dict[str, Any]:
        """The options that were left open and that the networks decided, by name: {"reviewkd.beta": 1.0}."""
        return self.methods.settled_options()

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Tells the methods that ``epoch`` (from 0) of ``epochs`` begins, and sets the factors of those that
        have a schedule.

        Until then the factors are 1. Raises ValueError for an epoch outside ``range(epochs)``.
        """
        self.methods.begin_epoch(epoch, epochs)

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        teacher_images: Tensor | None = None,
        taught: Output | None = None,
    ) -> Losses:
        batch = Batch(images, labels, index)
        teacher = (
            self.ask(images if teacher_images is None else teacher_images)
            if taught is None
            else _private.saveable(taught)
        )
        with entered(self.autocast):
            student = self._students(images)
        losses = self.methods.cross_entropy(student.logits, labels)
        student, teacher = self._as_seen(student), self._as_seen(teacher)
        records: dict[str, Any] = {}
        if teacher is not None:
            found, records = self.methods.losses(batch, student, teacher, entered(self.autocast))
            losses.update(found)
        if not losses:
            raise ValueError(
                f"labels is None, wanted (N,) int64: method {self.definition.name!r} has no loss but"
                " cross-entropy"
            )
        total = torch.stack(list(losses.values())).sum()
        return Losses(total, losses, student.logits, None if teacher is None else teacher.logits, records)

    @torch.no_grad()
    def update(self, index: Tensor, records: Mapping[str, Any]) -> None:
        """Call it after the optimizer's step: it gives the ``records`` of :class:`Losses` back to the methods
        that made them. ``index``: (N,) int64, the positions of their images. Of several processes, join the
        rows of all before, in the order of their ranks.
        """
        self.methods.hand_back(index, records)

    def check(self, images: int = 2) -> dict[str, list[backends.Call | backends.KernelCall]]:
        """Runs everything once on so many blank images, so that what does not fit raises before hours of
        training. Returns, by method, its calls of fastkd's operations.
        """
        blank = next(self.student.parameters()).new_zeros(images, *self.image_shape)
        labels = blank.new_zeros(images, dtype=torch.int64)
        batch = Batch(blank, labels, labels.add(1).cumsum(0) - 1)
        with undisturbed(self, *self._frozen):
            theirs = blank.new_zeros(images, *self.teacher_image_shape)
            student, teacher = map(self._as_seen, (self._students(blank), self.ask(theirs)))
            calls = dict[str, list[backends.Call | backends.KernelCall]]()
            for name in self.methods:
                with backends.record_calls() as calls[name]:
                    self.methods.losses(batch, student, teacher, entered(self.autocast), [name])
        return calls

    def _students(self, images: Tensor) -> Output:
        if not self._frozen:
            return Output(self.student(images), None)  # type: ignore[arg-type]
        return self.points[0].observe(self.views[0] or self.student, images)

    def ask(self, images: Tensor) -> Output | None:
        """The teacher's output for ``images``, to share among students; None without a teacher."""
        if not self._frozen:
            return None
        return self._frozen[0].ask(images, self.points[1])

    def _as_seen(self, output: Output | None) -> Any:
        return None if output is None else output._replace(logits=self.methods.seen_logits(output.logits))
