"""Options of a method that a recipe sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastkd.methods import Definition

# options of a method that a recipe sets, and why, by (recipe, method); a value that the user gives wins
OPTIONS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("digits", "semckd"): ("beta", "40", "the published 400 is infinite there after a few steps")
}


def options_of(name: str, method: str, said: Sequence[str]) -> tuple[list[str], list[str]]:
    """(options that the recipe ``name`` brings to ``method``, as command-line words; notes that say so)."""
    words, notes = [], []
    for (recipe, term), (field_name, value, why) in OPTIONS.items():
        names = {field_name, f"{term}.{field_name}", f"{term}.preset"}
        if (
            recipe == name
            and term in method.split("+")
            and not names & {word.partition("=")[0] for word in said}
        ):
            words.append(f"{term}.{field_name}={value}")
            notes.append(f"the recipe {name} gives {term} a {field_name} of {value}: {why}")
    return words, notes


def decided_options(name: str, method: Definition) -> dict[str, Any]:
    """The final values of the options that the recipe ``name`` may set: a command states them even where they
    are the published ones.
    """
    terms = {term.name: term for term in method.terms}
    return {
        f"{term}.{key}": getattr(terms[term].options, key)
        for (recipe, term), (key, *_) in OPTIONS.items()
        if recipe == name and term in terms
    }
