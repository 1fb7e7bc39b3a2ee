"""Rows of the table that differ in nothing but the seed, as one: mean and spread."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.methods import define, title_of
from fastkd.methods.options import written as option_written
from fastkd.training.recipe_options import decided_options, options_of
from fastkd.training.recipes import RECIPES

KEYS = (
    "method",
    "dataset",
    "student",
    "teacher",
    "recipe",
    "nepoch",
    "precision",
    "overrides",
    "teacher_checkpoint",
    "processes",
    "student_checkpoint",
)
OLD = {"processes": "1"}
"""The values of columns in rows that were written before these columns existed."""
DATASET_NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}


@dataclass(frozen=True)
class Group:
    """Runs of one configuration. ``rows`` has one per seed: of two runs of the same seed the later one."""

    key: dict[str, str]
    rows: list[Mapping[str, Any]]

    @property
    def seeds(self) -> list[str]:
        return [str(row["seed"]) for row in self.rows]

    def values(self, column: str) -> list[float]:
        return [value for value in (number(row.get(column)) for row in self.rows) if value is not None]

    def spread(self, column: str) -> str:
        return mean_and_spread(self.values(column))

    @property
    def figures(self) -> list[str]:
        """How many runs, and the mean and spread of their best and of their reported accuracies."""
        return [str(len(self.rows)), self.spread("acc"), self.spread("reported_acc")]

    @property
    def cells(self) -> list[str]:
        """Values of ``KEYS``, up to ``overrides``, for a line of a table, and several processes."""
        *first, overrides = (self.key[name] for name in KEYS[:8])
        more = f"processes={self.key['processes']}" if self.key["processes"] != "1" else ""
        return [*first, " ".join(filter(None, [overrides, more]))]


def groups(rows: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The configurations in ``rows``, in the order of their first rows."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(name) or OLD.get(name, "")) for name in KEYS), {})[
            str(row.get("seed", ""))
        ] = row
    return [Group(dict(zip(KEYS, key, strict=True)), list(seeds.values())) for key, seeds in found.items()]


def changes(row: Mapping[str, Any]) -> list[str]:
    """What the user has changed in the recipe, but for the epochs: ["lr=0.2"]. A flag that repeats the
    recipe's value is no change, nor is what the method or the recipe brings of itself.

    The batch is that of all processes together: 2 processes of 32 images take the steps of a recipe with 64.
    """
    recipe, given = RECIPES.get(str(row["recipe"])), given_of(row)
    given.pop("epochs", None)
    if recipe is None:
        return [f"{key}={value}" for key, value in given.items()]
    brought = _brought(str(row["method"]), str(row["recipe"]))
    given = {key: value for key, value in given.items() if value != brought.get(key)}
    processes = int(number(row.get("processes")) or 1)
    batch = given.pop("batch_size", None) or recipe.batch_size
    changed = [
        f"{key}={value}" for key, value in given.items() if value != written(getattr(recipe, key, None))
    ]
    if int(number(batch) or 0) * processes != recipe.batch_size:
        changed.append(f"batch_size={batch}" + f"×{processes}" * (processes > 1))
    return changed


def given_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The column ``overrides`` by name: "milestones=0.25 0.5 at.beta=500.0" has two."""
    given, name = dict[str, str](), ""
    for word in str(row.get("overrides") or "").split():
        key, equals, value = word.partition("=")
        name = key if equals else name
        given[name] = f"{given[name]} {word}" if not equals and name in given else value
    return given


@functools.cache
def _brought(method: str, recipe: str) -> dict[str, str]:
    """What a method changes in a recipe, and a recipe in a method's options, as ``overrides`` has it."""
    fields = RECIPES[recipe]
    try:
        sum_of = define(method, preset=fields.preset, words=options_of(recipe, method, ())[0])
        changed = sum_of.recipe(dataclasses.asdict(fields), ())
    except ValueError:  # a teacher's row, or of a method that is not there any more
        return {}
    options = decided_options(recipe, sum_of)
    return {key: written(value) for key, value in changed.items()} | {
        key: option_written(value) for key, value in options.items()
    }


def written(value: Any) -> str:
    """A field of a recipe in the column ``overrides``."""
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation (n - 1); of one value no deviation, of none a dash."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def described(row: Mapping[str, Any]) -> str:
    """What a run was, for a title: "AT on CIFAR-10, resnet20 ← resnet110, 10 epochs"."""
    method, dataset = str(row["method"]), str(row["dataset"])
    models = " ← ".join(filter(None, [str(row["student"]), str(row["teacher"])]))
    epochs = f"{row['nepoch']} epoch{'s' * (str(row['nepoch']) != '1')}"
    return f"{title_of(method)} on {DATASET_NAMES.get(dataset, dataset)}, {models}, {epochs}"
