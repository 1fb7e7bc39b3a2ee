"""Runs that differ in options of their method: accuracy by value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastkd.methods import Definition, define
from fastkd.methods.options import written
from fastkd.training.groups import KEYS, Group, changes, described, given_of, groups, number
from fastkd.training.recipes import RECIPES

Table = tuple[str, list[str], list[list[str]]]


def tables(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """(caption, heads, lines of cells) for each set of configurations that differ in nothing but options.

    An option that a row does not name has the value of the preset.
    """
    alike: dict[tuple[Any, ...], list[tuple[dict[str, str], Group]]] = {}
    for group in groups(rows):
        options = {key: value for key, value in given_of(group.key).items() if "." in key}
        rest = tuple(text for text in changes(group.key) if text.partition("=")[0] not in options)
        key = tuple(group.key[name] for name in KEYS if name != "overrides")
        alike.setdefault((*key, rest), []).append((options, group))
    made = []
    for (*_, rest), found in alike.items():
        names = dict.fromkeys(name for options, _ in found for name in options)
        values = [[value_of(group, options, name) for name in names] for options, group in found]
        varied = [i for i in range(len(names)) if len({line[i] for line in values}) > 1]
        if not varied:
            continue
        lines = [
            [*(line[i] for i in varied), *group.figures]
            for line, (_, group) in zip(values, found, strict=True)
        ]
        lines.sort(key=lambda line: [in_order(text) for text in line[: len(varied)]])
        fixed = [f"{name}={values[0][i]}" for i, name in enumerate(names) if i not in varied]
        caption = ", ".join([described(found[0][1].rows[0]), *rest, *fixed])
        heads = [*(list(names)[i] for i in varied), "runs", "best", "reported"]
        made.append((f"Accuracy by option: {caption}", heads, lines))
    return made


def value_of(group: Group, options: Mapping[str, str], name: str) -> str:
    """The value of the option ``name`` in a configuration whose ``options`` are those that were changed."""
    recipe, words = RECIPES.get(group.key["recipe"]), [f"{key}={value}" for key, value in options.items()]
    if name in options or recipe is None:
        return options.get(name, "–")
    try:
        preset = given_of(group.key).get("preset", recipe.preset)
        definition = define(group.key["method"], preset=preset, words=words)
    except ValueError:  # a method or an option that is not there any more
        return "–"
    return written(option_of(definition, name))


def option_of(definition: Definition, name: str) -> Any:
    section, _, field = name.partition(".")
    if section == "ce":
        return definition.ce
    term = next(term for term in definition.terms if term.name == section)
    return getattr(term if field in ("preset", "until") else term.options, field)


def in_order(text: str) -> tuple[bool, float, str]:
    """Numbers by their size, then words."""
    value = number(text)
    return value is None, value or 0.0, text
