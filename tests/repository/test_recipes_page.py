"""docs/recipes.md is what the code gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastkd.methods import METHODS, define
from fastkd.report import recipes
from fastkd.training.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_recipes_is_what_the_code_gives(one_thread):
    """After a change: python -m fastkd.report.recipes > docs/recipes.md"""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    made = recipes.markdown()
    assert page == made
    for name in METHODS:
        table = made.partition("## Methods")[2].partition("## Sums")[0].splitlines()
        rows = [line.split(" | ") for line in table if line.startswith(f"| `{name}` | ")]
        told = [recipe for row in rows for recipe in (RECIPES if row[1] == "all" else row[1].split(", "))]
        assert {recipe.strip("`") for recipe in told} == {*RECIPES}, name


def test_the_weights_of_each_sum_with_kd_are_told(one_thread):
    rows = [
        line.strip("| ").split(" | ")
        for line in recipes.markdown().partition("## Sums with KD")[2].splitlines()
    ]
    for recipe, fields in RECIPES.items():
        for name in METHODS[2:]:
            told = [
                row[2:]
                for row in rows
                if f"`{name}`" in row[0] and (row[1] == "all" or f"`{recipe}`" in row[1])
            ]
            definition = define(f"{name}+kd", preset=fields.preset)
            assert told == [[f"{definition.ce:g}", f"{definition.terms[-1].options.weight:g}"]], (
                recipe,
                name,
            )


def test_every_field_of_a_recipe_changes_its_row():
    """Whatever field of a recipe is another, the table shows it, new fields as well."""
    base = dataclasses.replace(RECIPES["kdzoo"])
    for field in dataclasses.fields(Recipe):
        value = getattr(base, field.name)
        if isinstance(value, tuple):
            other = (0.25, 0.3)
        elif isinstance(value, (bool, str)):
            other = not value if isinstance(value, bool) else value + "x"
        else:
            other = value + 1
        changed = dataclasses.replace(base, **{field.name: other})
        assert recipes._fields(changed) != recipes._fields(base), field.name
