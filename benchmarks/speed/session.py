"""One run: groups are measured when their first row is asked for, and each row is handed to pytest-benchmark
as it would have timed it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import pytest
import torch

from speed import machine, quiet, table, verdicts
from speed.measure import ROUNDS, Row, interleave, threads
from speed.stock import Stock, raise_malloc_thresholds

# of rounds a group and thread count; slow rows take their fewest rounds, however long those are
SECONDS = 0.8
ALL, ONE, DEVICE = "all threads", "1 thread", "device"
CLOCK = {ALL: "wall", ONE: "process", DEVICE: "wall"}
FORMAT = 1
RESULTS = machine.ROOT / "benchmarks" / "results"


class Group(Protocol):
    """Rows that are measured side by side."""

    id: str
    shared: Any  # consecutive groups of equal `shared` are built once
    # what it is measured by, one after the other: ALL and ONE on a CPU; DEVICE on a GPU, where each group has
    # its own clock
    labels: tuple[str, ...]

    def names(self, one_thread: bool) -> list[str]: ...
    def build(self, stock: Stock) -> Any: ...
    def row(self, built: Any, name: str) -> Row: ...
    def check(self, built: Any, row: Row) -> None: ...
    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Entry:
    """What one test is about."""

    group: Group
    threads: str
    row: str

    @property
    def id(self) -> str:
        return "-".join(
            part.replace(" ", "-").replace(",", "") for part in (self.group.id, self.threads, self.row)
        )


class Replay:
    """The clock of every benchmark, read by pytest-benchmark; it shows the time measured earlier."""

    def __init__(self) -> None:
        self._readings: list[float] = []

    def load(self, seconds: list[float]) -> None:
        self._readings = [reading for duration in reversed(seconds) for reading in (duration, 0.0)]

    def __call__(self) -> float:
        return self._readings.pop() if self._readings else 0.0


REPLAY = Replay()


def last_to_compile(rows: Iterable[Row]) -> list[Row]:
    """The rows of torch.compile after the others: compiling takes seconds, and if the time ends meanwhile the
    others can still be measured.
    """
    return sorted(rows, key=lambda row: "compile" in row.name)


def right(rows: dict[str, Row]) -> list[Row]:
    return [row for row in rows.values() if not row.failed]


class Session:
    """The groups of a run and what came of them. ``keep`` is called when a group was measured."""

    def __init__(
        self, full: bool, say: Callable[[str], None], keep: Callable[[Session], None] = lambda session: None
    ):
        self.full, self.say, self.keep = full, say, keep
        self.entries: dict[str, Entry] = {}
        self.records: list[dict[str, Any]] = []
        self.stock = Stock()
        self.begun = time.perf_counter()
        self._thread_counts = {ALL: torch.get_num_threads(), ONE: 1, DEVICE: torch.get_num_threads()}
        self._built: tuple[Any, Any] = (None, None)
        self._measured: tuple[Any, dict[str, Row], dict[str, Any]] = (None, {}, {})
        self._checked: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, groups: list[Group]) -> list[str]:
        """The ids of the groups' tests."""
        entries = [
            Entry(group, label, name)
            for group in groups
            for label in (group.labels if self.full else group.labels[-1:])
            for name in group.names(label == ONE)
        ]
        self.entries |= {entry.id: entry for entry in entries}
        return [entry.id for entry in entries]

    def bench(self, benchmark: Any, id: str) -> None:
        """The body of every benchmark. An ordinary run calls the row once and checks it."""
        entry = self.entries[id]
        benchmark.group = f"{entry.group.id}, {entry.threads}"
        if not self.full:
            row = entry.group.row(self._build(entry.group), entry.row)
            with threads(1):
                entry.group.check(self._built[1], row)
                benchmark.pedantic(row.run if row.turn is None else lambda: row.take_turn(1, False, "wall"))
            if row.failed:
                pytest.fail(row.failed)
            return
        rows, record = self._measure(entry)
        row = rows[entry.row]
        if row.failed:
            benchmark.disabled = True  # a wrong row has no speed
            benchmark.pedantic(lambda: None)
            pytest.fail(row.failed)
        REPLAY.load(row.seconds)
        benchmark.extra_info.update(
            {"threads": record["threads"], "clock": record["clock"], **record["rows"][entry.row]}
        )
        benchmark.pedantic(lambda: None, rounds=len(row.seconds))

    def _build(self, group: Group) -> Any:
        if self._built[0] != group.shared:
            self._built = (None, None)  # the memory of the last first
            self._built = (group.shared, group.build(self.stock))
        return self._built[1]

    def _measure(self, entry: Entry) -> tuple[dict[str, Row], dict[str, Any]]:
        key = (entry.group.id, entry.threads)
        if self._measured[0] == key:
            return self._measured[1:]
        if not self.records:
            self.tuned = raise_malloc_thresholds()
        begun = time.perf_counter()
        count, clock = self._thread_counts[entry.threads], CLOCK[entry.threads]
        group, waits = entry.group, list[float]()
        bounds = getattr(group, "rounds", ROUNDS)
        checked: dict[str, Row] = {}
        with threads(count):
            built = self._build(group)
            rows = {name: group.row(built, name) for name in group.names(entry.threads == ONE)}
            try:
                for row in last_to_compile(rows.values()):
                    self._check(group, built, row)
                    checked[row.name] = row
                prepared = time.perf_counter()
                waits = interleave(right(rows), clock, SECONDS, bounds, waits)
            except KeyboardInterrupt:
                with contextlib.suppress(Exception):
                    if not waits and entry.threads == DEVICE:  # its minutes are few, and each row counts
                        interleave(right(checked), clock, SECONDS, (bounds[0],) * 2, waits)
                    if min(len(row.seconds) for row in right(checked)) >= bounds[0]:
                        self._record(entry, count, checked, waits)
                raise
        record = self._record(entry, count, rows, waits)
        self._measured = (key, rows, record)
        now = time.perf_counter()
        spent = f"{prepared - begun:.1f} s to build, compile and check, {now - prepared:.1f} s to measure"
        self.say(f"{now - self.begun:4.0f} s  {group.id}, {entry.threads}: {spent}")
        return rows, record

    def _record(self, entry: Entry, count: int, rows: dict[str, Row], waits: list[float]) -> dict[str, Any]:
        """What was measured, among the records."""
        clock = CLOCK[entry.threads]
        record = {"device": "cpu", "threads": count, "clock": clock, **entry.group.describe(), "rows": {}}
        if waits:
            spread = quiet.spread([row.seconds for row in rows.values()])
            record |= {"waiting": round(median(waits), 3), "spread": round(spread, 3)}
        for name, row in rows.items():
            record["rows"][name] = (
                {"failed": row.failed} if row.failed else self._summary(entry.group, rows, row)
            )
        self.records.append(record)
        self.keep(self)
        return record

    def _check(self, group: Group, built: Any, row: Row) -> None:
        try:
            group.check(built, row)
        except Exception as error:
            row.failed = f"{type(error).__name__}: {error}"

    def _summary(self, group: Group, rows: dict[str, Row], row: Row) -> dict[str, Any]:
        q1, _, q3 = quantiles(row.seconds, n=4, method="inclusive")
        malloc = (
            "stock" if (row.turn and group.labels[0] != DEVICE) or not self.tuned else "thresholds raised"
        )
        return {
            **group.figures(rows, row.name),
            "quartiles": [1e3 * q1, 1e3 * q3],
            "rounds": len(row.seconds),
            "malloc": malloc,
        }

    def result(self, command: list[str]) -> dict[str, Any]:
        """The whole run as plain data."""
        return {
            "format": FORMAT,
            **machine.facts(command),
            "seconds": round(time.perf_counter() - self.begun),
            "groups": self.records,
        }

    def close(self) -> None:
        self.stock.close()


def save(result: dict[str, Any], folder: Path | None) -> str:
    """Write the result under the device's name, or into ``folder``; what came of it, in a line."""
    folder = folder or RESULTS / machine.slug(result["device"])
    target = folder / "speed.json"
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        return f"the results are not saved: {target}: {error.strerror}"
    return f"results: {target}   (python benchmarks/report.py makes a table and a plot of them)"


def summary(result: dict[str, Any]) -> list[str]:
    """What a person reads at the end; its first line says so if the machine was not quiet."""
    why = quiet.why_not_judged(result)
    if why is not None:
        return [why, *table.ratio_lines(quiet.trusted(result))]
    return [*table.lines(result), "", *verdicts.lines(result)]
