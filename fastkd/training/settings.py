"""The settings that the command line gives, and their defaults."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd import plugins
from fastkd.errors import UserError
from fastkd.io.files import as_path
from fastkd.training.recipes import SETTINGS

PRECISIONS = ("fp32", "bf16")
POINTS = ("student_points", "teacher_points")
FOLDERS = ("image_size", "student_size", "teacher_size", "workers", "on_bad_image")
"""Settings that only the data set "folder" uses."""
AUTO = "auto"
"""The value of ``resume`` with which a queue starts a job again and again until it is finished."""
VARIABLES = ("FASTKD_BACKEND", "FASTKD_CPU", "FASTKD_AMX", "OMP_NUM_THREADS")
"""The variables of the environment that a run's bits depend on and for which there is no flag."""


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    ``precision`` "auto": bf16 where the device has instructions for it, else fp32.
    ``setting``: a letter of ``SETTINGS``, whose teacher, student, data set and recipe stand in where those
    are None. Without one they are ``resnet20`` twice, ``auto`` and ``digits`` on digits, else ``hankyul2``.
    ``device`` None: a GPU if there is one; ``overrides``: fields of the recipe; ``options``: of the method,
    ("at.beta=500",); ``compile``, ``cuda_graph`` None: where it saves time; ``resume``: "" looks for the
    unfinished run, "auto" begins it where there is none, anything else is its folder. ``teacher_seed`` None:
    that of the run; ``pictures``: the sheets of attention maps at the end, where matplotlib is there. Paths
    may be strings, and begin with ``~``. ``plugins``: files or modules that register methods, models or data
    sets, imported by the constructor. ``more_teachers``: (model, checkpoint) of each teacher but the first;
    ``join_teachers`` "losses" (None) or "logits": what the mean is of. ``more_points``: the points of each
    teacher but the first; None: ``teacher_points`` are those of all. ``teacher_normalization``: by what the
    images of a teacher with a checkpoint are normalized, "0.5,0.5,0.5/0.5,0.5,0.5" (mean, deviation) or
    "data", one for all teachers or one for each; None: what its weights declare.

    ``student_points``, ``teacher_points``: names of submodules whose outputs are a network's stages; None:
    the usual ones. For the data set "folder": ``image_size`` (224) of both networks, ``student_size`` and
    ``teacher_size`` of one; ``workers``, processes that read images; ``on_bad_image`` "stop" (None) or
    "skip". ``dry_run``: the plan and one step, and nothing is written.

    The constructor raises UserError for a path that is none, and for a plugin that cannot be loaded.
    """

    method: str
    dataset: str | None = None
    data: Path = Path("data")
    setting: str | None = None
    teacher: str | None = None
    student: str | None = None
    teacher_checkpoint: Path | None = None
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    teacher_seed: int | None = None
    device: str | None = None
    precision: str = "fp32"
    deterministic: bool = False
    compile: bool | None = None
    cuda_graph: bool | None = None
    options: tuple[str, ...] = ()
    output: Path = Path("runs")
    resume: str | None = None
    pictures: bool = True
    student_checkpoint: Path | None = None
    student_points: tuple[str, ...] | None = None
    teacher_points: tuple[str, ...] | None = None
    image_size: int | None = None
    student_size: int | None = None
    teacher_size: int | None = None
    workers: int | None = None
    on_bad_image: str | None = None
    dry_run: bool = False
    plugins: tuple[str, ...] = ()
    more_teachers: tuple[tuple[str, Path], ...] = ()
    join_teachers: str | None = None
    more_points: tuple[tuple[str, ...], ...] | None = None
    teacher_normalization: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for file in self.plugins:
            plugins.load(file)
        if self.more_teachers:
            more = tuple((name, as_path(file)) for name, file in self.more_teachers)
            object.__setattr__(self, "more_teachers", more)
        for name in ("data", "output", "teacher_checkpoint", "student_checkpoint", "resume"):
            value = getattr(self, name)
            if value is None and name not in ("data", "output"):
                continue
            try:
                path = as_path(value) if value != "" or name != "resume" else ""
            except TypeError:
                raise UserError(f"{name} is {value!r}, wanted a path") from None
            object.__setattr__(self, name, str(path) if name == "resume" else path)


def environment() -> list[str]:
    """``VARIABLES`` that are set, as a shell takes them before a command."""
    return [f"{name}={os.environ[name]}" for name in VARIABLES if os.environ.get(name)]


@dataclass(frozen=True)
class Models:
    """Who teaches whom on what, every name given."""

    teacher: str
    student: str
    dataset: str


def resolve(settings: Settings) -> Models:
    """The names that ``settings`` gives or implies. Raises UserError for an unknown letter."""
    if settings.setting is None:
        implied = Models("resnet20", "resnet20", "auto")
    elif settings.setting in SETTINGS:
        implied = Models(*SETTINGS[settings.setting], "cifar100")
    else:
        raise UserError(f"setting {settings.setting!r} is not known; known: {', '.join(SETTINGS)}")
    said = {key: getattr(settings, key) for key in ("teacher", "student", "dataset")}
    return dataclasses.replace(implied, **{key: value for key, value in said.items() if value is not None})


def recipe_of(settings: Settings, dataset: str) -> str:
    """The recipe's name: the settings a to j are SAKD's table."""
    if settings.recipe is not None:
        return settings.recipe
    usual = "hankyul2" if settings.setting is None else "sakd"
    return {"digits": "digits", "folder": "imagenet"}.get(dataset, usual)
