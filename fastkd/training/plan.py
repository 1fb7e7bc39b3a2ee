"""What a run will do: the settings, checked against each other and the machine before any work begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastkd
from fastkd.methods import Method, create_method
from fastkd.models import create_model
from fastkd.training import records
from fastkd.training.batches import Batches, generator
from fastkd.training.datasets import Dataset, choose_dataset, load_dataset
from fastkd.training.errors import UserError
from fastkd.training.files import make_folder
from fastkd.training.recipes import NORMALIZATIONS, Recipe, get_recipe

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    ``recipe`` None: ``digits`` on digits, else ``hankyul2``; ``device`` None: a GPU if there is one; ``overrides``: fields of the recipe.
    """

    method: str
    dataset: str = "auto"
    data: Path = Path("data")
    teacher: str = "resnet20"
    student: str = "resnet20"
    teacher_checkpoint: Path | None = None
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str | None = None
    precision: str = "fp32"
    output: Path = Path("runs")


class Plan:
    """The settings resolved: recipe, method, device, data in memory. The constructor raises UserError for whatever cannot work."""

    def __init__(self, settings: Settings):
        self.settings = settings
        name, self.why = choose_dataset(settings.dataset, settings.data)
        self.recipe_name = settings.recipe or ("digits" if name == "digits" else "hankyul2")
        self.recipe: Recipe = get_recipe(self.recipe_name, settings.overrides)
        self.device = find_device(settings.device)
        if settings.precision not in PRECISIONS:
            raise UserError(f"precision {settings.precision!r} is not known; known: {', '.join(PRECISIONS)}")
        try:
            self.method: Method = create_method(settings.method, self.recipe.preset)
            teacher, student = create_model(settings.teacher), create_model(settings.student)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.method.needs_teacher:
            self._check_fit(student, teacher)
        make_folder(settings.output)
        records.read_rows(settings.output)
        self.data: Dataset = load_dataset(name, settings.data)
        smallest = min(
            [len(self.data.train_labels)] * self.recipe.drop_last + [len(self.data.test_labels)] * self.recipe.drop_last_test + [2**62]
        )
        if self.recipe.batch_size > smallest:
            raise UserError(f"--batch-size is {self.recipe.batch_size}, but {name} has parts of only {smallest} images")

    def _check_fit(self, student: nn.Module, teacher: nn.Module) -> None:
        try:
            self.method.check(student, teacher)
        except fastkd.BackendError as error:
            raise UserError(" ".join(str(error).split())) from None
        except (ValueError, TypeError) as error:
            pair = f"{self.settings.teacher} as teacher and {self.settings.student} as student"
            raise UserError(f"method {self.settings.method} does not fit {pair}: {' '.join(str(error).split())}") from None

    def new_model(self, role: str) -> nn.Module:
        """The untrained "student" or "teacher", its weights drawn from (seed, role): two of one architecture begin apart."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, role, "weights").initial_seed())
            return create_model(self.settings.teacher if role == "teacher" else self.settings.student, self.data.classes)

    def batches(self, role: str) -> tuple[Batches, Batches]:
        """The training and test batches of the student's or the teacher's training."""
        data, recipe = self.data, self.recipe
        mean, std = NORMALIZATIONS.get(recipe.normalization, (data.mean, data.std))
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        common: dict[str, Any] = {"mean": mean, "std": std, "device": self.device, "dtype": dtype}
        random: dict[str, Any] = {"seed": self.settings.seed, "stream": role, "flip": data.flip, "pad_mode": recipe.pad_mode}
        train = Batches(data.train_images, data.train_labels, batch_size=recipe.batch_size, drop_last=recipe.drop_last, **random, **common)
        # an accuracy over all images does not depend on the batch; one over whole batches does
        size = recipe.batch_size if recipe.drop_last_test else 500
        return train, Batches(data.test_images, data.test_labels, batch_size=size, drop_last=recipe.drop_last_test, **common)

    def autocast(self) -> torch.autocast:
        """What the models' forward passes run under; the losses do not."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.precision == "bf16")

    def teacher_path(self) -> Path:
        """Where the teacher of this data set, model, recipe, length and seed is kept, other fields of the recipe included if overridden."""
        # a teacher's own training knows neither a teacher nor loss weights
        changed = {key: value for key, value in self.settings.overrides.items() if key not in ("epochs", "teacher_mode", "preset")}
        name = [self.data.name, self.settings.teacher, self.recipe_name, f"{self.recipe.epochs}epochs", f"seed{self.settings.seed}"]
        name += [f"{key}={value}" for key, value in sorted(changed.items())]
        return self.settings.output / "teachers" / f"{'-'.join(name)}.pt"

    def config(self) -> dict[str, Any]:
        """All of it in plain values, for the records."""
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self.settings).items()}
        resolved = {"dataset": self.data.name, "recipe": self.recipe_name, "device": str(self.device)}
        return {
            **settings,
            **resolved,
            "fields": dataclasses.asdict(self.recipe),
            "fastkd": fastkd.__version__,
            "torch": str(torch.__version__),
        }

    def describe(self) -> str:
        """One screen for the start of the run."""
        settings, data = self.settings, self.data
        student = sum(parameter.numel() for parameter in create_model(settings.student, data.classes).parameters())
        teacher = sum(parameter.numel() for parameter in create_model(settings.teacher, data.classes).parameters())
        fields = [f"{key} {value}" for key, value in dataclasses.asdict(self.recipe).items()]
        lines = [
            f"fastkd   {fastkd.__version__}, torch {torch.__version__}",
            f"method   {settings.method}: {' + '.join(self.method.names)}",
            f"student  {settings.student}, {student:,} parameters",
            f"teacher  {settings.teacher}, {teacher:,} parameters" if self.method.needs_teacher else "teacher  none",
            f"data     {data.name} ({self.why}), {len(data.train_labels):,} training and {len(data.test_labels):,} test images",
            f"recipe   {self.recipe_name}: {', '.join(fields[:7])},",
            f"         {', '.join(fields[7:])}",
            f"device   {device_name(self.device)}, {settings.precision}, seed {settings.seed}",
            f"output   {settings.output}",
        ]
        return "\n".join(lines)


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, or by itself a GPU if there is one. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; wanted cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees no such GPU here")
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
