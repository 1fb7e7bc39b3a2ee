"""What is kept of a speed run that is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from speed import plugin, session
from speed.measure import Row
from speed.session import ALL, DEVICE, Entry, Session


class Group:
    """Its rows cost nothing. ``stops``: the row whose check is interrupted, or the turn that is."""

    id, shared = "group", None
    labels = (DEVICE,)

    def __init__(self, stops: str | int | None = None):
        self.stops, self.turns = stops, 0
        self.checked: list[str] = []

    def names(self, one_thread: bool) -> list[str]:
        return ["eager", "torch.compile", "cuda"]

    def build(self, stock: Any) -> None:
        pass

    def row(self, built: None, name: str) -> Row:
        return Row(name, lambda: None, turn=self.turn)

    def turn(self, calls: int, warm: bool, clock: str) -> float:
        self.turns += 1
        if self.turns == self.stops:
            raise KeyboardInterrupt
        return 1e-3 + 1e-6 * self.turns

    def check(self, built: None, row: Row) -> None:
        self.checked.append(row.name)
        if row.name == self.stops:
            raise KeyboardInterrupt

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        return {"milliseconds": 1e3 * median(rows[name].seconds)}

    def describe(self) -> dict[str, Any]:
        return {"operation": "attention"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(session, "raise_malloc_thresholds", lambda: False)
    monkeypatch.setattr(session.quiet, "waiting", lambda: 1.0)
    made = Session(True, lambda text: None)
    yield made
    made.close()


def test_torch_compile_takes_its_seconds_last(run: Session) -> None:
    group = Group()
    rows, record = run._measure(Entry(group, DEVICE, "eager"))
    assert group.checked == ["eager", "cuda", "torch.compile"]
    assert [*rows] == [*record["rows"]] == group.names(False)  # the table's order


GUESSING = 9  # turns of three rows before the rounds


@pytest.mark.parametrize(
    ("stops", "kept"),
    [
        ("torch.compile", ["eager", "cuda"]),
        (GUESSING + 5 * 3 + 2, ["eager", "cuda", "torch.compile"]),
        (GUESSING + 3 * 3, []),  # too few rounds
    ],
    ids=["compiling", "sixth round", "third round"],
)
def test_a_group_that_is_stopped_keeps_what_is_finished(
    run: Session, stops: str | int, kept: list[str]
) -> None:
    group = Group(stops)
    saved: list[int] = []
    run.keep = lambda session: saved.append(len(session.records))
    entry = Entry(group, DEVICE, "eager")
    with pytest.raises(KeyboardInterrupt):
        run._measure(entry)
    rows = run.records[0]["rows"] if run.records else {}
    assert [*rows] == kept and saved == [1] * bool(kept)
    assert all(row["rounds"] >= 5 and row["milliseconds"] > 0 for row in rows.values())


def test_after_an_interrupt_nothing_is_measured_on_a_cpu(run: Session) -> None:
    group = Group("torch.compile")
    with pytest.raises(KeyboardInterrupt):
        run._measure(Entry(group, ALL, "eager"))
    assert group.turns == 0 and not run.records


def test_each_group_is_saved_when_it_was_measured(
    tmp_path: Path, run: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"benchmark_full": True, "benchmark_results": tmp_path}
    config: Any = SimpleNamespace(
        stash=pytest.Stash(),
        getoption=lambda name, default=None: options.get(name, default),
        pluginmanager=SimpleNamespace(get_plugin=lambda name: None),
        invocation_params=SimpleNamespace(args=["--benchmark"]),
    )
    made = plugin.session_of(config)
    made._measure(Entry(Group(), DEVICE, "eager"))
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert [*saved["groups"][0]["rows"]] == Group().names(False)
