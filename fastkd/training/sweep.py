"""The students that one command asks for: several methods, and grids of their options."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from fastkd.data import choose_dataset
from fastkd.errors import UserError
from fastkd.methods import define
from fastkd.training.recipes import get_recipe
from fastkd.training.settings import Settings, recipe_of, resolve


def points(settings: Settings) -> list[Settings]:
    """``settings`` for each method of "kd,at+kd", and for each point of the grid that commas in its options
    span: ("at.beta=250,500", "kd.temperature=2,4") has four.

    Of several methods each takes the options of its own terms. Raises UserError.
    """
    methods = settings.method.split(",")
    again = next((name for i, name in enumerate(methods) if name in methods[:i]), None)
    if again is not None:
        raise UserError(f"--method {settings.method} has {again or 'a method without a name'} twice")
    grid = [values_of(word) for word in settings.options]
    unread = set(range(len(grid)))
    found = []
    for method in methods:
        one = dataclasses.replace(settings, method=method)
        mine = [i for i in range(len(grid)) if len(methods) == 1 or reads(one, grid[i][0])]
        unread -= {*mine}
        for words in itertools.product(*(grid[i] for i in mine)):
            found.append(dataclasses.replace(one, options=words))
    if unread:
        word = settings.options[min(unread)]
        wanted = (
            "one of their terms before the point" if "." in word.partition("=")[0] else "TERM.FIELD=VALUE"
        )
        raise UserError(f"--option {word}: no method of {settings.method} takes it, wanted {wanted}")
    return found


def values_of(word: str) -> list[str]:
    """ "at.beta=250,500" as "at.beta=250" and "at.beta=500". Raises UserError."""
    name, equals, values = word.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if len(parts) > 1 and "" in parts:
        raise UserError(f"--option {word}: a value of the grid is empty, wanted values with commas between")
    again = next((part for i, part in enumerate(parts) if part in parts[:i]), None)
    if again is not None:
        raise UserError(f"--option {word}: the grid has {again} twice")
    return [f"{name}{equals}{part}" for part in parts]


def reads(settings: Settings, word: str) -> bool:
    """Whether the method, one of several, has the term that an option names; cross-entropy is in all."""
    section, point, _ = word.partition("=")[0].rpartition(".")
    return bool(point) and section in ("ce", *terms_of(settings))


def terms_of(settings: Settings) -> Sequence[str]:
    """The terms of a method, those that its authors add included."""
    dataset = choose_dataset(resolve(settings).dataset, settings.data)[0]
    preset = get_recipe(recipe_of(settings, dataset), settings.overrides).preset
    try:
        return define(settings.method, preset=preset).names
    except ValueError:  # one whose options must decide something, or one that is not known: Config says so
        return settings.method.split("+")


def labels(each: Sequence[Settings]) -> list[str]:
    """What tells the runs of one seed apart: the method, and the options that have other values elsewhere."""
    found = []
    for one in each:
        others = [other for other in each if other.method == one.method]
        own = [word for word in one.options if not all(word in other.options for other in others)]
        found.append(" ".join([one.method, *own]))
    return found
