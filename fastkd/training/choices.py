"""The choices of a run as plain values: when two runs are the same, and what is recorded."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import plugins
from fastkd.data import Folder
from fastkd.methods.options import written
from fastkd.models import specs
from fastkd.models.normalization import Normalization
from fastkd.models.specs import file_name
from fastkd.training.images import Images
from fastkd.training.recipes import RECIPES
from fastkd.training.settings import POINTS, environment
from fastkd.training.teacher_images import RECORD
from fastkd.training.teacher_images import written as normalization_written

ALONE = ("epochs", "teacher_mode", "preset", "init_epochs", "init_lr", "init_milestones")
"""Fields that a teacher's own training does not use, or whose value is in its file's name already."""

USUAL = {
    "precision": "fp32",
    "device": "cpu",
    "deterministic": False,
    "compiled": False,
    "cuda_graph": False,
    "processes": 1,
}
"""The usual values of what a teacher's training depends on: its file's name says only where it differs."""


class Choices(Images):
    """The settings, and all that was chosen where they left it open. ``role`` is "student" or "teacher"."""

    recipe_name: str
    points: dict[str, tuple[str, ...] | None]
    """By role the submodules whose outputs are a network's stages; None for a network with its own stages."""
    more_points: list[tuple[str, ...] | None]
    """Those of each teacher but the first."""
    teacher_normalizations: list[Normalization | None]
    """By what each teacher's images are normalized; None where that is as the student's are."""
    asked_normalization: tuple[str, ...] | None
    device: torch.device
    processes: int
    compiled: bool
    captured: bool
    settled: dict[str, Any]
    """Options left open, whose values the networks and the data decided."""

    def seed_of(self, role: str) -> int:
        given = self.settings.teacher_seed
        return self.settings.seed if role != "teacher" or given is None else given

    @property
    def teacher_seed(self) -> int | None:
        """The seed of the teacher that this run trains or finds trained; None where it is the run's own."""
        seed, ready = self.seed_of("teacher"), self.settings.teacher_checkpoint is not None
        return seed if self.method.needs_teacher and not ready and seed != self.settings.seed else None

    def model_name(self, role: str) -> str:
        return self.models.teacher if role == "teacher" else self.models.student

    def teacher_path(self) -> Path:
        """The teacher's file: its name differs wherever the teacher's identity does."""
        recipe, identity = RECIPES[self.recipe_name], self.identity("teacher")
        changed = {
            key: value
            for key, value in dataclasses.asdict(self.recipe).items()
            if value != getattr(recipe, key)
        }
        changed = {key: value for key, value in changed.items() if key not in ALONE}
        changed |= {key: identity[key] for key, usual in USUAL.items() if identity[key] != usual}
        if "plugins" in identity:  # teachers of other texts of the user's files lie side by side
            changed["files"] = _hash(repr(sorted(identity["plugins"].items())), 4)
        data = self.data.name
        if isinstance(self.data, Folder):
            data, changed["image_size"] = f"{data}-{self.data.fingerprint[:8]}", identity["image_size"]
        name = [
            data,
            file_name(self.models.teacher),
            self.recipe_name,
            f"{self.recipe.epochs}epochs",
            f"seed{self.seed_of('teacher')}",
        ]
        extra = "-".join(f"{key}={value}" for key, value in sorted(changed.items()))
        if len(extra) > 100:  # a file's name ends at 255 bytes
            extra = _hash(extra, 8)
        return self.settings.output / "teachers" / f"{'-'.join(filter(None, [*name, extra]))}.pt"

    def identity(self, role: str) -> dict[str, Any]:
        """All that the student's or the teacher's weights depend on, in plain values. Only a run of the same
        identity is resumed.
        """
        settings, fields = self.settings, {**dataclasses.asdict(self.recipe)}
        if role == "teacher":
            fields = {key: value for key, value in fields.items() if key == "epochs" or key not in ALONE}
        identity: dict[str, Any] = {
            "trained": "teacher" if role == "teacher" else settings.method,
            "dataset": self.data.name,
            "model": self.model_name(role),
            "recipe": self.recipe_name,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()},
            "seed": self.seed_of(role),
            "precision": settings.precision,
            "device": self.device.type,
            "deterministic": settings.deterministic,
            "compiled": self.compiled,
            "cuda_graph": self.captured,
            "processes": self.processes,
        }
        if self.added(role):
            identity["plugins"] = self.added(role)
        if isinstance(self.data, Folder):
            identity |= {"images": self.data.fingerprint, "image_size": self.side(role)}
        if role != "teacher" and self.method.needs_teacher:
            identity |= self._differing()
            identity |= {"teacher": self.models.teacher, "teacher_weights": self.teacher_weights}
            if self.teacher_seed is not None:
                identity["teacher_seed"] = self.teacher_seed
            if self.settings.more_teachers:
                identity |= {"more_teachers": self.more_weights, "join_teachers": self.join_teachers}
        if role != "teacher" and self.student_weights is not None:
            identity["student_weights"] = self.student_weights
        if role != "teacher" and self.method.changes:
            identity["options"] = {key: written(value) for key, value in self.method.changes.items()}
        return identity

    def added(self, role: str) -> dict[str, str]:
        """What it uses that is not fastkd's, and its origin: {"method vector": "my_file.py 1a2b3c4d"}."""
        used = [("dataset", self.data.name), ("model", self.model_name(role))]
        if role == "student":
            used += [("method", term.name) for term in self.method.terms]
            used += [("model", name) for name, _ in self.all_teachers] * self.method.needs_teacher
        found = {
            f"{kind} {name}": specs.origin(name)
            if kind == "model" and specs.is_spec(name)
            else plugins.origin(kind, name)
            for kind, name in used
        }
        return {key: where for key, where in found.items() if where is not None}

    def _differing(self) -> dict[str, Any]:
        """The part of a student's identity that only networks and images of the user's own have."""
        found: dict[str, Any] = {
            f"{role}_points": list(points) for role, points in self.points.items() if points is not None
        }
        if self.side("teacher") != self.side("student"):
            found["teacher_size"] = self.side("teacher")
        if any(points != self.points["teacher"] for points in self.more_points):
            found["more_points"] = [points and list(points) for points in self.more_points]
        if any(self.teacher_normalizations):
            found["teacher_normalization"] = [*map(normalization_written, self.teacher_normalizations)]
        return found

    def words_of_teachers(self) -> dict[str, list[str]]:
        """By flag, the words that the command which repeats the run gives it: one word per teacher."""
        found, settings = dict[str, list[str]](), self.settings
        if settings.more_points and settings.teacher_points:
            found["teacher_points"] = [
                ",".join(points) for points in (settings.teacher_points, *settings.more_points)
            ]
        if self.asked_normalization or any(self.teacher_normalizations):
            found["teacher_normalization"] = [*map(normalization_written, self.teacher_normalizations)]
        return found

    def own_words(self, role: str) -> list[str]:
        """Flags about networks and images of the user's own that change the result: ["image_size=64"]."""
        names = [f"{role}_size", "image_size", *["teacher_size", *POINTS] * (role == "student")]
        given = {name: getattr(self.settings, name) for name in dict.fromkeys(names)}
        if role == "student":
            given |= {name: "+".join(words) for name, words in self.words_of_teachers().items()}
        said = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return [f"{name}={value}" for name, value in said.items() if value is not None]

    @property
    def join_teachers(self) -> str:
        return self.settings.join_teachers or "losses"

    def teachers(self) -> str:
        """The names of all teachers: "resnet56 + resnet110"."""
        return " + ".join(name for name, _ in self.all_teachers)

    def config(self) -> dict[str, Any]:
        """All of it in plain values, for the records."""
        settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self.settings).items()
        }
        settings["more_teachers"] = [[name, str(file)] for name, file in self.settings.more_teachers]
        resolved = {
            **dataclasses.asdict(self.models),
            "dataset": self.data.name,
            "recipe": self.recipe_name,
            "device": str(self.device),
            "classes": self.data.classes,
            "points": [self.points["student"], self.points["teacher"]],
            "sides": [self.side("student"), self.side("teacher")],
            RECORD: normalization_written(self.normalization()),
        }
        return {
            **settings,
            **resolved,
            "fields": dataclasses.asdict(self.recipe),
            "environment": environment(),
            "fastkd": fastkd.__version__,
            "torch": str(torch.__version__),
        }

    def options(self) -> list[str]:
        """The options of the method that were changed, as the command line has them: "at.beta=500.0"."""
        return [f"{key}={written(value)}" for key, value in self.method.changes.items()]


def _hash(text: str, size: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
