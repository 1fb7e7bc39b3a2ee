"""docs/recipes.md, made from the code: every number that a run depends on, by recipe, method and pair.

python -m fastkd.report.recipes > docs/recipes.md
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastkd.io.console import screens
from fastkd.methods import METHODS, BuildContext, Definition, Distiller, define
from fastkd.methods.context import shapes
from fastkd.methods.options import written
from fastkd.models import Features, create_model
from fastkd.training import results
from fastkd.training.recipe_options import options_of
from fastkd.training.recipes import RECIPES, SETTINGS, Recipe

HEAD = """# Recipes

Every number that a run of `train.py` depends on: the fields of each recipe, the networks of each setting, and
the weights and options of each method. `python -m fastkd.report.recipes` makes this page from the values that
a run reads.

The default is `hankyul2`; for digits it is `digits`, for a folder of images `imagenet`. Every field has a
flag ([training](training.md)), and the run's row in the results names the flags that were given. With other
`--epochs`, the milestones and the length of a first phase keep their fractions of the run. With `--recipe`
given, a method changes no field of it.

`imagenet` is the recipe of AT's authors (`imagenet.py` of szagoruyko/attention-transfer), who compare the
four stages of ResNet-34 and ResNet-18. Images of a folder are not padded: a random part of each is resized.
"""
METHODS_TEXT = """## Methods

What each method takes by each recipe, unless `--option` says otherwise: the weights of cross-entropy (CE) and
of KD, which some methods are trained with; the method's own options; and the fields of the recipe that it
changes. This KD has temperature 4. Where the networks or the data decide a value, it is that for CIFAR-100.
"""
SUMS_TEXT = """## Sums with KD

The weights of cross-entropy and of KD in `METHOD+kd`. The method's own options are those of the table above.
"""


def markdown() -> str:
    """The whole document."""
    heads = ["recipe", *_fields(RECIPES["digits"])]
    recipes = results.markdown(
        heads, ([f"`{name}`", *_fields(each).values()] for name, each in RECIPES.items())
    )
    letters = results.markdown(
        ["setting", "teacher", "student"], ([f"`{letter}`", *pair] for letter, pair in SETTINGS.items())
    )
    heads = ["method", "recipe", "setting", "CE", "KD", "options", "changes in the recipe"]
    methods = results.markdown(heads, (row for name in METHODS for row in rows_of(name)))
    sums = results.markdown(["METHOD", "recipe", "CE", "KD"], sums_with_kd())
    parts = [HEAD, recipes, "## Settings\n", letters, METHODS_TEXT, methods, SUMS_TEXT, sums]
    return "\n".join(parts)


def sums_with_kd() -> list[list[str]]:
    """(methods, recipes, weight of cross-entropy, of KD): a row for each pair of weights of some methods."""
    found: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for method in METHODS:
        if method in ("baseline", "kd"):
            continue
        weights: dict[tuple[str, str], list[str]] = {}
        for recipe, fields in RECIPES.items():
            definition = define(f"{method}+kd", preset=fields.preset)
            weights.setdefault(_numbers(definition, {})[:2], []).append(recipe)
        rows = tuple((_names(recipes), *numbers) for numbers, recipes in weights.items())
        found.setdefault(rows, []).append(f"`{method}`")
    return [[", ".join(methods), *row] for rows, methods in found.items() for row in rows]


def _fields(recipe: Recipe) -> dict[str, str]:
    """The fields of a recipe as a reader wants them, by head."""
    values = dataclasses.asdict(recipe)
    at = [f"{fraction * recipe.epochs:g}" for fraction in recipe.milestones]
    first = [f"{fraction * recipe.init_epochs:g}" for fraction in recipe.init_milestones]
    kinds = ["Nesterov"] * recipe.nesterov + ["new at each drop"] * recipe.new_optimizer
    left_out = ["training"] * recipe.drop_last + ["test"] * recipe.drop_last_test
    phase = (
        f"{recipe.init_epochs} epochs at {recipe.init_lr:g}"
        + f", × {recipe.gamma:g} at {', '.join(first)}" * bool(first)
    )
    found = {
        "epochs": str(recipe.epochs),
        "batch": str(recipe.batch_size),
        "learning rate": f"{recipe.lr:g}, × {recipe.gamma:g} at {', '.join(at)}",
        "momentum": ", ".join([f"{recipe.momentum:g}", *kinds]),
        "decay": f"{recipe.weight_decay:g}",
        "padding": recipe.pad_mode,
        "smaller batch left out": ", ".join(left_out) or "–",
        "teacher": recipe.teacher_mode,
        "normalization": recipe.normalization,
        "preset": f"`{recipe.preset}`",
        "first phase of FSP": phase if recipe.init_epochs else "–",
        "reports": recipe.report,
    }
    told = {
        "epochs", "batch_size", "lr", "milestones", "gamma", "momentum", "nesterov", "new_optimizer",
        "weight_decay", "pad_mode", "drop_last", "drop_last_test", "teacher_mode", "normalization", "preset",
        "report", "init_epochs", "init_lr", "init_milestones",
    }  # fmt: skip
    # a field that is new is told as it is, until it has a place above
    return found | {key: written(value) for key, value in values.items() if key not in told}


def rows_of(method: str) -> list[list[str]]:
    """The rows of a method: one for each set of numbers, with the recipes and settings that have it."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for recipe, fields in RECIPES.items():
        brought, _ = options_of(recipe, method, ())
        definition = define(method, preset=fields.preset, words=brought)
        changed = definition.recipe(dataclasses.asdict(fields), ())
        changes = ", ".join(
            f"{key} {written(value)}" for key, value in changed.items() if value != getattr(fields, key)
        )
        for pairs, settled in _by_pair(definition):
            found.setdefault((pairs, *_numbers(definition, settled), changes), []).append((recipe, ""))
    return [
        [f"`{method}`", _names(recipe for recipe, _ in recipes), pairs, ce, kd, options, changes or "–"]
        for (pairs, ce, kd, options, changes), recipes in found.items()
    ]


def _numbers(definition: Definition, settled: dict[str, Any]) -> tuple[str, str, str]:
    """(weight of cross-entropy, of KD, the options of the method itself)."""
    kd = [term for term in definition.terms if term.name == "kd"]
    own = [term for term in definition.terms if term.name == definition.name]
    options = {
        field.name: settled.get(f"{term.name}.{field.name}", getattr(term.options, field.name))
        for term in own
        for field in dataclasses.fields(term.options)
    }
    weight = f"{kd[0].options.weight:g}" if kd else "–"
    return (
        f"{definition.ce:g}",
        weight,
        ", ".join(f"{key} {_short(value)}" for key, value in options.items()) or "–",
    )


def _by_pair(definition: Definition) -> list[tuple[str, dict[str, Any]]]:
    """(settings, options that their networks decide); one entry "all" where the networks decide none."""
    for term in definition.terms:
        left_open = [
            field
            for field in dataclasses.fields(term.kind.Options)
            if getattr(term.options, field.name) is None
        ]
        if term.name == definition.name and left_open:
            by_pair = any("pair of networks" in field.metadata["help"] for field in left_open)
            return _decided(term.name, term.kind, term.options, by_pair)  # type: ignore[arg-type]
    return [("all", {})]


@functools.cache
def _decided(
    name: str, kind: type[Distiller], options: Any, by_pair: bool
) -> list[tuple[str, dict[str, Any]]]:
    found: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    pairs = {**SETTINGS, "x4": ("resnet32x4", "resnet8x4")} if by_pair else {"a": SETTINGS["a"]}
    for letter, (teacher, student) in pairs.items():
        made = kind(_context(teacher, student), options)
        settled = {f"{name}.{key}": value for key, value in made.settled.items()}
        found.setdefault(tuple(settled.items()), []).append(letter)
    if len(found) == 1:
        return [("all", dict(next(iter(found))))]
    return [(", ".join(_pair(letter) for letter in letters), dict(key)) for key, letters in found.items()]


@functools.cache
def _network(name: str) -> tuple[nn.Module, Features]:
    """A network for CIFAR-100, and the shapes of its features."""
    network = create_model(name, 100)
    return network, shapes(network, (3, 32, 32))[0]


def _context(teacher: str, student: str) -> BuildContext:
    (mine, my_shapes), (theirs, their_shapes) = _network(student), _network(teacher)
    labels = torch.arange(50_000) % 100
    return BuildContext(mine, theirs, my_shapes, their_shapes, 100, labels, batch_size=64, epochs=240)


def _pair(letter: str) -> str:
    return "ResNet-32x4 → 8x4" if letter == "x4" else f"`{letter}`"


def _names(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return "all" if len(found) == len(RECIPES) else ", ".join(f"`{name}`" for name in found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else written(value)


if __name__ == "__main__":
    with screens():
        print(markdown(), end="")
