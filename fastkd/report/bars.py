"""Accuracy by method, one bar a method, for runs that differ in the method alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.io import figures
from fastkd.methods import title_of
from fastkd.report.curves import COLOURS
from fastkd.training.groups import DATASET_NAMES, Group, changes, groups
from fastkd.training.recipes import RECIPES

PLACE = ("dataset", "student", "recipe", "nepoch", "precision")


def places(rows: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[str, ...], list[Group]]]:
    """The panels: runs of one data set, student, recipe, length, precision and teacher, from the worst
    method to the best. A baseline, which has no teacher, is in the panels of all teachers.
    """
    found = [group for group in groups(rows) if group.key["method"] != "teacher" and group.values("acc")]
    teachers = dict.fromkeys(
        (*(group.key[name] for name in PLACE), group.key["teacher"])
        for group in found
        if group.key["teacher"]
    )
    panels = []
    for *place, teacher in teachers:
        bars = [
            group
            for group in found
            if [group.key[name] for name in PLACE] == place and group.key["teacher"] in ("", teacher)
        ]
        if len(bars) > 1:
            bars.sort(key=lambda group: sum(group.values("acc")) / len(group.values("acc")))
            panels.append(((*place, teacher), bars))
    return panels


def label_of(group: Group) -> str:
    return ", ".join([title_of(group.key["method"]), *changes(group.key)])


def colour_of(method: str) -> str:
    found = COLOURS.get(method) or COLOURS.get(method.partition("+")[0])
    return found or "black"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws :func:`figure` into a file. Raises UserError."""
    made = figure(rows)
    if made is None:
        raise UserError("--bars: no two methods with the same data set, networks, recipe and length")
    figures.save(made, path, "--bars")


def figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A panel for each place of ``rows`` with two methods or more, else None. Raises UserError."""
    figure_class = figures.wanted("--bars")
    panels = places(rows)
    if not panels:
        return None
    heights = [0.9 + 0.27 * len(bars) for _, bars in panels]
    made = figure_class((7.2, sum(heights) + 0.3), dpi=100, layout="constrained")
    axes = made.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for (place, bars), axis in zip(panels, axes, strict=True):
        draw(axis, place, bars)
    return made


def draw(axis: Any, place: tuple[str, ...], bars: list[Group]) -> None:
    dataset, student, recipe, epochs, precision, teacher = place
    whole = RECIPES[recipe].epochs if recipe in RECIPES else None
    length = (
        f"{epochs} of {whole} epochs" if whole is not None and str(whole) != epochs else f"{epochs} epochs"
    )
    what = DATASET_NAMES.get(dataset, dataset), f"{student} ← {teacher}", f"recipe {recipe}"
    axis.set_title(", ".join([*what, length, precision]), fontsize=9, weight="bold")
    lowest = min(min(group.values("acc")) for group in bars)
    highest = max(max(group.values("acc")) for group in bars)
    for i, group in enumerate(bars):
        values = group.values("acc")
        mean = sum(values) / len(values)
        axis.barh(i, mean, color=colour_of(group.key["method"]), height=0.72)
        if len(values) > 1:
            axis.plot([min(values), max(values)], [i, i], color="black", linewidth=1.2, marker="|")
        axis.annotate(
            group.spread("acc"), (max(values), i), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
        if group.key["method"] == "baseline":
            axis.axvline(mean, color="#333333", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(bars)), [label_of(group) for group in bars], fontsize=8)
    margin = max(highest - lowest, 0.5)
    begin = max(0.0, lowest - 0.5 * margin)
    axis.set_xlim(begin, min(100.0 + margin, highest + 0.35 * margin))
    text = "best test accuracy, %" + "; the axis does not begin at 0" * (begin > 0)
    axis.set_xlabel(f"{text}; dashed: baseline", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
