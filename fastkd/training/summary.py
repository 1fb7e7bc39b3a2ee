"""Rows of the table that differ in nothing but the seed, as one: mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("method", "dataset", "student", "teacher", "recipe", "nepoch", "precision", "overrides", "teacher_checkpoint")
METHOD_NAMES = {"teacher": "teacher", "baseline": "baseline", "kd": "KD", "at": "AT", "fsp": "FSP", "at+kd": "AT+KD"}
DATASET_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion-mnist": "Fashion-MNIST", "digits": "digits"}
SHOWN = (*KEYS[:8], "seeds", "acc", "reported_acc")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, ``rows`` with one a seed: of two runs of the same seed the later."""

    key: dict[str, str]
    rows: list[Mapping[str, Any]]

    @property
    def seeds(self) -> list[str]:
        return [str(row["seed"]) for row in self.rows]

    def values(self, column: str) -> list[float]:
        return [value for value in (number(row.get(column)) for row in self.rows) if value is not None]

    def told(self, column: str) -> str:
        return told(self.values(column))


def groups(rows: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The configurations in ``rows``, in the order of their first rows."""
    found: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(str(row.get(name) or "") for name in KEYS), {})[str(row.get("seed", ""))] = row
    return [Group(dict(zip(KEYS, key, strict=True)), list(seeds.values())) for key, seeds in found.items()]


def number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def told(values: Sequence[float], digits: int = 2) -> str:
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
    return f"{METHOD_NAMES.get(method, method)} on {DATASET_NAMES.get(dataset, dataset)}, {models}, {epochs}"


def cells(group: Group) -> list[str]:
    """A group's line under the heads ``SHOWN``."""
    return [*(group.key[name] for name in SHOWN[:8]), " ".join(group.seeds), group.told("acc"), group.told("reported_acc")]
