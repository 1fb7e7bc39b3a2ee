"""The curves of runs, from the epochs.csv in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.io import figures
from fastkd.methods import METHODS, colour_of, title_of
from fastkd.training import results
from fastkd.training.groups import DATASET_NAMES, changes, written

COLOURS = {
    "teacher": "#555555",
    "baseline": "#999999",
    **{name: colour_of(name) for name in METHODS[1:]},
    "at+kd": "#cc79a7",
}
PANELS = (
    ("test_acc", "test accuracy, %"),
    ("train_acc", "training accuracy, %"),
    ("loss", "training loss, all terms"),
)
TERMS = tuple((name, f"{title_of(name)} loss") for name in sorted(METHODS[1:], key=lambda name: name == "kd"))


@dataclass(frozen=True)
class Curve:
    """One run: what it was, and its columns by epoch."""

    about: dict[str, str]
    epochs: list[dict[str, float]]

    @property
    def place(self) -> tuple[str, ...]:
        """Data set, recipe, epochs and precision: the row of the figure in which it is drawn."""
        return tuple(self.about.get(name) or "" for name in ("dataset", "recipe", "nepoch", "precision"))

    @property
    def label(self) -> str:
        about = self.about
        models = " ← ".join(filter(None, [about["student"], about["teacher"]]))
        parts = [
            title_of(about["method"]),
            models,
            *changes(about),
            "" if about["finished"] else "unfinished",
        ]
        return ", ".join(filter(None, parts))


def read(folders: Sequence[Path], wanted: Mapping[str, str]) -> Iterator[Curve]:
    """The runs with a log whose row (or configuration) has the ``wanted`` values. Raises UserError."""
    for output in folders:
        rows = {row.get("folder"): row for row in results.read_rows(output)[1]}
        for path in sorted(output.glob("*/epochs.csv")):
            about: dict[str, Any] | None = rows.get(path.parent.name) or from_config(path.parent)
            if about is None:
                continue
            about = {**about, "finished": path.parent.name in rows}
            if all(str(about.get(name) or "") == value for name, value in wanted.items()):
                yield Curve(about, read_epochs(path))


def from_config(folder: Path) -> dict[str, Any] | None:
    """What the row of an unfinished run would say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return {
            **{name: config[name] for name in ("dataset", "recipe", "seed", "precision")},
            "method": config["trained"],
            "student": config["model"],
            "teacher": config["identity"].get("teacher", ""),
            "nepoch": str(config["fields"]["epochs"]),
            "overrides": " ".join(f"{key}={written(value)}" for key, value in config["overrides"].items()),
            "processes": str(config["identity"].get("processes", 1)),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_epochs(path: Path) -> list[dict[str, float]]:
    rows = results.read_table(path, ("epoch",))[1]
    try:
        return [{key: float(value) for key, value in row.items()} for row in rows]
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def plot(folders: Sequence[Path], wanted: Mapping[str, str], path: Path) -> None:
    """Draws :func:`figure` into a file. Raises UserError."""
    made = figure(folders, wanted)
    if made is None:
        raise UserError(f"--plot: no runs with an epochs.csv under {', '.join(map(str, folders))}")
    figures.save(made, path, "--plot")


def figure(folders: Sequence[Path], wanted: Mapping[str, str]) -> Any:
    """A row of panels for each data set, recipe and length; a colour a method, a line a seed. None where no
    run has a log. Raises UserError.
    """
    figure_class = figures.wanted("--plot")
    curves = [curve for curve in read(folders, wanted) if curve.epochs]
    if not curves:
        return None
    places = sorted({curve.place for curve in curves})
    columns, heights, parts = 3, [], []
    for place in places:
        there = [curve for curve in curves if curve.place == place]
        terms = [(key, text) for key, text in TERMS if any(key in curve.epochs[0] for curve in there)]
        parts.append((there, [*PANELS, *terms]))
        heights.append(-(-len(parts[-1][1]) // columns))
    made = figure_class((3.6 * columns, 2.7 * sum(heights) + 0.5), dpi=100, layout="constrained")
    rows = made.subfigures(len(places), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, (there, panels), height in zip(rows, parts, heights, strict=True):
        draw(row, there, panels, height, columns)
    return made


def draw(
    figure: Any, curves: list[Curve], panels: Sequence[tuple[str, str]], height: int, columns: int
) -> None:
    from matplotlib.ticker import MaxNLocator

    dataset, recipe, epochs, precision = curves[0].place
    length = f"{epochs} epoch{'s' * (epochs != '1')}"
    figure.suptitle(
        f"{DATASET_NAMES.get(dataset, dataset)}, recipe {recipe}, {length}, {precision}",
        fontsize=10,
        weight="bold",
    )
    axes = figure.subplots(height, columns, squeeze=False).flatten()
    names = list(COLOURS)
    curves = sorted(
        curves,
        key=lambda curve: (
            names.index(curve.about["method"]) if curve.about["method"] in names else len(names)
        ),
    )
    # runs of one method that are more than seeds of each other differ in the dashes
    labels: dict[str, list[str]] = {}
    for curve in curves:
        found = labels.setdefault(curve.about["method"], [])
        found += [] if curve.label in found else [curve.label]
    lines: dict[str, Any] = {}
    for (key, text), axis in zip(panels, axes, strict=False):
        for curve in curves:
            points = [(epoch["epoch"], epoch[key]) for epoch in curve.epochs if key in epoch]
            if points:
                method = curve.about["method"]
                dashes = ("-", "--", "-.", ":")[labels[method].index(curve.label) % 4]
                marker = "." if len(points) < 20 else ""
                style = {
                    "color": COLOURS.get(method, "black"),
                    "linestyle": dashes,
                    "linewidth": 1.3,
                    "marker": marker,
                    "markersize": 4,
                }
                (lines[curve.label],) = axis.plot(*zip(*points, strict=True), **style)
        axis.set_title(text, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("epoch", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
