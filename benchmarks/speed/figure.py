"""docs/speed.md's table and figure: each loss against the form in which it is published, on one thread in
processor time; in the table, the whole step with it too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speed import table
from speed.goals import BACKEND, GOALS, PLAIN, Record

# what a loss with backends is compared with: the form that its users run
AGAINST = {("attention", "resnet20-128"): "eager", ("fsp", "resnet20-64"): "eager, broadcast"}
NAMES = {"attention": "at"}


@dataclass(frozen=True)
class Line:
    """A loss: milliseconds and extra bytes of the published form and of ours; the goal of their ratio.

    ``step``: the whole step with it, a line of its own.
    """

    loss: str
    case: str
    milliseconds: tuple[float, float]
    memory: tuple[int, int] | None
    goal: float | None
    step: Line | None = None

    @property
    def ratio(self) -> float:
        return self.milliseconds[0] / self.milliseconds[1]

    @property
    def short(self) -> bool:
        return self.goal is not None and self.ratio < self.goal


def _goal(record: Record) -> float | None:
    """The goal for the published form's time ÷ ours on one thread, if there is one."""
    fields = {"method", "operation"}
    found = [
        goal.bound
        for goal in GOALS
        if goal.clock == "process"
        and goal.title.endswith(("published ÷ fastkd", f"eager ÷ {BACKEND}"))
        # the memory's goals have the same end, after a comma
        and not goal.title.endswith("memory, published ÷ fastkd")
        and fields & goal.where.keys() & record.keys()
        and all(record.get(key) in wanted for key, wanted in goal.where.items())
    ]
    return found[0] if found else None


def lines(result: dict[str, Any]) -> list[Line]:
    """A line for each method and case that was measured on one thread, the largest ratio first."""
    out, steps = [], dict[tuple[str, str], Line]()
    for record in result["groups"]:
        if record["clock"] != "process":
            continue
        key = record.get("operation"), record.get("shape")
        if "method" in record:
            names, about = ("published", "fastkd"), (record["method"], record["case"])
        elif key in AGAINST and all(record[field] in wanted for field, wanted in PLAIN.items()):
            names, about = (AGAINST[key], BACKEND), (NAMES.get(key[0], key[0]), key[1])
        else:
            continue
        rows = [record["rows"].get(name, {}) for name in names]
        times, memory = ([row.get(field) for row in rows] for field in ("milliseconds", "extra_memory"))
        if all(times):
            sizes = (memory[0], memory[1]) if None not in memory else None
            line = Line(*about, (times[0], times[1]), sizes, _goal(record))
            if "of" in record:
                steps[(record["of"][0], record["of"][1])] = line
            else:
                out.append(line)
    out = [replace(line, step=steps.get((line.loss, line.case))) for line in out]
    return sorted(out, key=lambda line: -line.ratio)


def cells(found: list[Line], judged: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table; no time, and nothing called short, of a machine that was not quiet.

    Steps have columns where one was measured.
    """
    heads = ["loss", "case", "published, ms", "fastkd, ms", "÷", "goal", "published, MB", "fastkd, MB"]
    rows = []
    for line in found:
        ratio = table.figure(line.ratio) + (" (short)" if judged and line.short else "")
        sizes = [f"{size / 1e6:.1f}" for size in line.memory] if line.memory else ["", ""]
        goal = "" if line.goal is None else f"{line.goal:g}"
        rows.append([line.loss, line.case, *map(table.figure, line.milliseconds), ratio, goal, *sizes])
    if not judged:
        heads, rows = heads[:2] + heads[4:], [row[:2] + row[4:] for row in rows]
    if any(line.step for line in found):
        heads += ["step ÷", "step's goal"]
        for line, row in zip(found, rows):
            row += _step_cells(line.step, judged)
    return heads, rows


def _step_cells(step: Line | None, judged: bool) -> list[str]:
    if step is None:
        return ["", ""]
    ratio = table.figure(step.ratio, 2) + (" (short)" if judged and step.short else "")
    return [ratio, "" if step.goal is None else f"{step.goal:g}"]


def draw(found: list[Line], target: Path) -> None:
    """A bar for each line, on a logarithmic scale, with a mark at each goal. Needs matplotlib."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, where it is unknown, would end the import
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastkd", "font.size": 9})
    from matplotlib import pyplot

    cases = [line.loss for line in found]
    labels = [line.loss if cases.count(line.loss) == 1 else f"{line.loss}, {line.case}" for line in found]
    figure, axis = pyplot.subplots(figsize=(8, 0.6 + 0.3 * len(found)))
    places = range(len(found))
    drawn = axis.barh(places, [line.ratio for line in found], 0.7, color="#2a6fbb")
    axis.bar_label(drawn, [f"{line.ratio:.1f}" for line in found], fontsize=7, padding=3)
    goals = [(place, line.goal) for place, line in zip(places, found) if line.goal is not None]
    axis.plot(
        [goal for _, goal in goals], [place for place, _ in goals], "|", color="black", ms=14, label="goal"
    )
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("times faster than the published form: loss and gradient, float32, one thread")
    axis.axvline(1, color="#8f8f8f", lw=0.8)
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, format="svg", metadata={"Date": None})
    pyplot.close(figure)
