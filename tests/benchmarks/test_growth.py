"""How losses grow: the fitted power, and the files of a small run."""

from __future__ import annotations

import json

import growth
import pytest


def test_a_small_run_writes_its_table_its_numbers_and_its_figure(tmp_path, monkeypatch, one_thread):
    pytest.importorskip("matplotlib")
    sizes = (10, 20, 40, 80)
    assert growth.exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    few = (
        (growth.crd, {"k": 7, "batch": 3, "width": 5}, "size", (20, 40), (80,)),
        (growth.rkd, {"width": 5}, "batch", (4, 8), (16,)),
    )
    monkeypatch.setattr(growth, "AXES", few)
    assert growth.main(["--full", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [(row["loss"], row["axis"], row["sizes"]) for row in rows] == [
        ("crd", "N", [20, 40, 80]),
        ("rkd", "B", [4, 8, 16]),
    ]
    assert all(value > 0 for row in rows for value in row["milliseconds"])
    assert (tmp_path / "growth.md").read_text().count("| crd | N (K 7, B 3, D 5) | 20: ") == 1
    assert "<svg" in (tmp_path / "growth.svg").read_text()
