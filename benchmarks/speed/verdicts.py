"""How far a run is from the goals: geometric means over the shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from speed import quiet
from speed.goals import BACKEND, GOALS, Goal, time_of


def geometric_mean(values: list[float]) -> float:
    """exp(mean(log)). Raises ValueError for none, or for one that is not above 0."""
    if not values or min(values) <= 0:
        raise ValueError(f"values are {values}, wanted some, all above 0")
    return math.exp(sum(map(math.log, values)) / len(values))


@dataclass
class Verdict:
    """A goal and what was measured: for each shape a value, by its name."""

    goal: Goal
    values: dict[str, float]

    @property
    def mean(self) -> float:
        return geometric_mean(list(self.values.values()))

    @property
    def reached(self) -> bool:
        return self._holds(self.mean)

    @property
    def shortfalls(self) -> dict[str, float]:
        return {name: value for name, value in self.values.items() if not self._holds(value)}

    def _holds(self, value: float) -> bool:
        return value >= self.goal.bound if self.goal.at_least else value <= self.goal.bound


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """The goals that the result has figures for; none where the machine was not quiet."""
    if quiet.why_not_judged(result) is not None:
        return []
    groups = [{"device": "cpu", **record} for record in result["groups"]]
    most = max((record["threads"] for record in groups), default=0)
    out = []
    for goal in GOALS:
        values = {}
        records = [r for r in groups if r["device"] == goal.device and r["clock"] == goal.clock]
        records = [r for r in records if r["clock"] != "wall" or r["device"] != "cpu" or r["threads"] == most]
        for record in (r for r in records if all(r.get(key) in wanted for key, wanted in goal.where.items())):
            if goal.against is None:
                value = goal.value(record)
            else:
                keys = ("operation", "shape", "dtype", "layout", "direction", "upstream")
                wanted = {key: record[key] for key in keys} | goal.against
                others = [r for r in records if all(r.get(key) == wanted[key] for key in keys)]
                mine, theirs = time_of(record, BACKEND), time_of(others[0], BACKEND) if others else None
                value = mine / theirs if mine and theirs else None
            if value is not None:
                varied = [key for key in ("dtype", "layout") if len(goal.where.get(key, ())) > 1]
                about = next(record[key] for key in ("shape", "step", "case") if key in record)
                name = " ".join([about, *(record[key] for key in varied)])
                values[name] = value
        if values:
            out.append(Verdict(goal, values))
    return out


def lines(result: dict[str, Any]) -> list[str]:
    """A line for each goal: geometric mean, spread, bound, verdict, and each shape that falls short of it."""
    found = verdicts(result)
    if not found:
        return []
    width = max(len(v.goal.title) for v in found)
    out = [f"{'goals: geometric means over the shapes':<{width}}  {'mean':>6}  {'from … to':>15}  goal"]
    for v in found:
        spread = f"{min(v.values.values()):.2f} … {max(v.values.values()):.2f}"
        bound = f"{'≥' if v.goal.at_least else '≤'} {v.goal.bound:g} {v.goal.unit}".rstrip()
        verdict = "reached" if v.reached else "NOT REACHED"
        short = ", ".join(f"{name} {value:.2f}" for name, value in v.shortfalls.items())
        note = f"; short: {short}" if short else ""
        out.append(f"{v.goal.title:<{width}}  {v.mean:6.2f}  {spread:>15}  {bound}: {verdict}{note}")
    return out
