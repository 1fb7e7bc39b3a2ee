"""The networks of a run: where their features are, what images they take, and whether a method fits them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

import fastkd
from fastkd.backends import Call, KernelCall
from fastkd.distillation import Distillation
from fastkd.errors import UserError, one_line
from fastkd.methods import Definition
from fastkd.models import create_model, load_weights
from fastkd.models.normalization import Normalization
from fastkd.models.specs import declared_normalization, is_foreign, stages_of, suggested
from fastkd.seeds import seeded
from fastkd.several_teachers import SeveralTeachers, check_join, kept_bytes
from fastkd.training.choices import Choices
from fastkd.training.evaluation import check_logits
from fastkd.training.settings import Settings
from fastkd.training.teacher_images import for_each, identity_of, parsed, recorded, written

ROLES = ("student", "teacher")


class Networks(Choices):
    """The part of the settings that concerns the networks, and what is built of it."""

    declared: dict[str, list[Normalization | None]]
    """By role, for each network: the normalization that its package declares for its published weights."""
    notes: list[str]  # what the first screen says of the choices
    calls: dict[str, list[Call | KernelCall]]
    student_parameters: int  # of the student that a method has changed
    kept: dict[str, int]  # bytes that a method keeps beside what is trained

    def find_points(self) -> None:
        """Finds the points of all networks, given or default ones. Raises UserError for an unknown one."""
        settings, found = self.settings, dict[str, list[tuple[str, ...] | None]]()
        common, self.declared = settings.teacher_points, {}
        own = settings.more_points or [common] * len(settings.more_teachers)
        asked = {"student": [(self.models.student, settings.student_checkpoint, settings.student_points)]}
        asked["teacher"] = [
            (*each, points) for each, points in zip(self.all_teachers, [common, *own], strict=True)
        ]
        for role, networks in asked.items():
            found[role], self.declared[role] = [], []
            for name, file, given in networks:
                try:
                    network = create_model(name, self.data.classes)
                except ValueError as error:
                    raise UserError(f"--{role} {name}: {error}") from None
                found[role].append(stages_of(network) if given is None else given)
                self.declared[role].append(declared_normalization(network, name, file))
        self.points = {role: each[0] for role, each in found.items()}
        self.more_points = found["teacher"][1:]

    def find_normalizations(self) -> Settings:
        """How the teachers' images are normalized, as asked for or as their weights declare it; returns the
        settings that say so. Raises UserError.
        """
        settings, own, teachers = self.settings, self.normalization(), self.all_teachers
        self.asked_normalization = asked = settings.teacher_normalization
        found: list[Normalization | None] = [None] * len(teachers)
        if not self.method.needs_teacher or settings.teacher_checkpoint is None:
            self.teacher_normalizations = found
            return settings
        if asked:
            try:
                found = [*map(parsed, for_each("--teacher-normalization", asked, len(teachers)))]
            except ValueError as error:
                raise UserError(f"--teacher-normalization is {error}") from None
        else:  # a run of fastkd has recorded it; what a package declares holds for its published weights
            found = [
                recorded(trained, self.data) if trained else declared
                for (_, trained), declared in zip(self.teacher_files, self.declared["teacher"], strict=True)
            ]
            self.notes = [*self.notes, *self._unrecorded(found)]
        self.teacher_normalizations = [
            None if each is None or written(each) == written(own) else each for each in found
        ]
        return dataclasses.replace(
            settings, teacher_normalization=tuple(map(written, self.teacher_normalizations))
        )

    def _unrecorded(self, found: list[Normalization | None]) -> list[str]:
        """Notes on teachers of other images, whose runs have not recorded how those were normalized."""
        notes = []
        for (name, file), (_, trained), known in zip(
            self.all_teachers, self.teacher_files, found, strict=True
        ):
            dataset = identity_of(trained).get("dataset")
            if trained and known is None and dataset != self.data.name:
                notes.append(
                    f"the teacher {name} was trained on {dataset}, and {file} does not say how those images"
                    f" were normalized: it gets this run's; --teacher-normalization gives others"
                )
        return notes

    def check_networks(self) -> None:
        """Tries the networks on blank images, and the method on both. Raises UserError."""
        self.calls, self.settled, self.student_parameters, self.kept = {}, {}, 0, {}
        for role in ROLES[: 1 + self.method.needs_teacher]:
            if is_foreign(self.model_name(role)):
                self._check_logits(role)
        if self.method.needs_teacher:
            self._check_fit()

    def _check_logits(self, role: str) -> None:
        name, shape = self.model_name(role), self.image_shape(role)
        network = create_model(name, self.data.classes)
        check_logits(network, torch.zeros(2, *shape), self.data.classes, f"--{role} {name}")

    def _check_teachers(self) -> None:
        """Raises UserError or ValueError unless the method can have as many teachers as are given."""
        more = self.settings.more_teachers
        if self.settings.join_teachers is not None and not more:
            raise UserError("--join-teachers is given, but there is one teacher: wanted several --teacher")
        if more and self.settings.teacher_checkpoint is None:
            raise UserError("--teacher-checkpoint is missing: of several teachers each wants one")
        if more:
            check_join(self.method, self.join_teachers)
            self.more_weights  # noqa: B018 - reads the files before any training

    def new_teacher(self) -> nn.Module:
        """An untrained teacher, or a ModuleList of all."""
        made = [create_model(name, self.data.classes) for name, _ in self.all_teachers]
        return nn.ModuleList(made) if len(made) > 1 else made[0]

    def _check_fit(self) -> None:
        student = create_model(self.model_name("student"), self.data.classes).to(self.device)
        try:
            self._check_teachers()
            teacher = self.new_teacher().to(self.device)
            with warnings.catch_warnings():  # what it notes is on the first screen
                warnings.simplefilter("ignore")
                trial = self.distillation("student", student, teacher, self.method, fold=False)
            self.notes = [*self.notes, *trial.notes]
            self.calls = trial.check(self.recipe.batch_size if self.method.whole_batches else 2)
            self.settled = trial.settled()
            self.method = dataclasses.replace(self.method, changes={**self.method.changes, **self.settled})
            self.kept = kept_bytes(trial)
            self.student_parameters = sum(parameter.numel() for parameter in trial.student.parameters())
        except fastkd.BackendError as error:
            raise UserError(one_line(error)) from None
        except (ValueError, TypeError) as error:
            pair = f"{self.models.teacher} as teacher and {self.models.student} as student"
            text = one_line(error)
            raise UserError(
                f"method {self.settings.method} does not fit {pair}: {text}{self._points_in_words(text)}"
            ) from None

    def _points_in_words(self, error: str) -> str:
        """For an error about networks that are not fastkd's: the points in use, or points that might do."""
        told = []
        for role in ROLES:
            points = self.points[role]
            if points is None and is_foreign(self.model_name(role)) and f"{role}_points" in error:
                network = create_model(self.model_name(role), self.data.classes)
                found = suggested(network, self.image_shape(role))
                told.append(f"--{role}-points, such as {','.join(found) or 'A,B,C'}")
            elif points is not None:
                told.append(f"--{role}-points {','.join(points)}")
        return f" ({'; '.join(told)})" if told else ""

    def distillation(
        self,
        role: str,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Definition,
        fold: bool = True,
        train_images: Iterable[Any] | None = None,
    ) -> Distillation:
        """What trains ``student`` by ``method``; both networks are on the device.

        Without ``train_images`` it is for checks only: two blank images stand in for the training set.
        """
        shape = self.image_shape("teacher")
        several = isinstance(teacher, nn.ModuleList) and method.needs_teacher
        kind: Any = partial(SeveralTeachers, join=self.join_teachers) if several else Distillation
        points: Any = self.points["teacher"]
        if several and self.more_points:
            points = [self.points["teacher"], *self.more_points]
        rest: dict[str, Any] = {}
        if method.needs_teacher and any(self.teacher_normalizations):
            theirs = [each or self.normalization() for each in self.teacher_normalizations]
            rest["normalization"] = self.normalization()
            rest["teacher_normalization"] = theirs if several else theirs[0]
        made: Distillation = kind(
            student,
            teacher if method.needs_teacher else None,
            method,
            student_points=self.points["student"] if method.needs_teacher else None,
            teacher_points=points if method.needs_teacher else None,
            train_labels=self.data.train_labels,
            train_images=[torch.zeros(2, *shape)] if train_images is None else train_images,
            num_classes=self.data.classes,
            batch_size=self.recipe.batch_size,
            epochs=self.recipe.epochs,
            autocast=self.autocast(),
            teacher_mode=self.recipe.teacher_mode,
            seed=self.seed_of(role),
            fold=fold,
            image_shape=self.image_shape(role),
            teacher_image_shape=shape if role == "student" else None,
            **rest,
        )
        return made

    def new_model(self, role: str) -> nn.Module:
        """The untrained "student" or "teacher", its weights drawn from (seed, role), or a student's from
        ``--student-checkpoint``.
        """
        with seeded(self.seed_of(role), role, "weights"):
            network = create_model(self.model_name(role), self.data.classes)
        if role == "student" and self.settings.student_checkpoint is not None:
            load_weights(network, self.settings.student_checkpoint)
        return network

    def autocast(self) -> torch.autocast:
        """What the models' forward passes run under; the losses do not."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16"
        )
