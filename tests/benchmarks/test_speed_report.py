"""Goals, tables and reports of a benchmark."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import report
from speed import quiet, table, verdicts
from speed.session import save, summary


def record(operation: str, shape: str, times: dict[str, float], **other: Any) -> dict[str, Any]:
    fields = {
        "operation": operation,
        "shape": shape,
        "dtype": "float32",
        "layout": "nchw",
        "direction": "forward+backward",
        "upstream": 1,
    }
    fields |= {"threads": 2, "clock": "wall", "memory_unit": 100, "bytes": 1000}
    rows: dict[str, dict[str, Any]] = {name: {"milliseconds": value} for name, value in times.items()}
    if "cpp" in rows:
        rows["cpp"] |= {"extra_memory": 150, "of_mm_rate": 0.7, "error": {"loss": 1e-7}, "gflop_per_s": 50.0}
    return {**fields, "rows": rows, **other}


@pytest.fixture
def result() -> dict[str, Any]:
    """A small made-up run."""
    groups = [
        record("attention", "resnet20-64", {"streaming floor": 1, "eager": 8, "torch.compile": 2, "cpp": 1}),
        record(
            "attention", "resnet20-128", {"streaming floor": 1, "eager": 16, "torch.compile": 8, "cpp": 2}
        ),
        record("attention", "resnet20-64", {"eager": 7, "cpp": 1.5}, layout="channels_last"),
        record("fsp", "resnet20-64", {"eager": 70, "eager, broadcast": 1000, "cpp": 10}),
        record("attention", "resnet20-64", {"eager": 3, "cpp": 100}, threads=1, clock="process"),
        {
            "loop": "AT",
            "shape": "resnet20 > resnet20",
            "threads": 2,
            "clock": "wall",
            "rows": {
                "toolkit, float32": {"milliseconds": 400, "images_per_second": 320.0},
                "loop, float32": {"milliseconds": 250, "images_per_second": 512.0},
                "loop, bfloat16": {"milliseconds": 160, "images_per_second": 800.0},
                "loop, bfloat16, compiled": {"milliseconds": 100, "images_per_second": 1280.0},
                "distillation loss in loop, float32": {"milliseconds": 10},
            },
        },
        {
            "step": "AT",
            "precision": "bfloat16 autocast",
            "threads": 2,
            "clock": "wall",
            "rows": {"eager, cpp": {"milliseconds": 100, "images_per_second": 1280.0}},
        },
    ]
    return {
        "format": 1,
        "device": "Some CPU",
        "machine": {"cpu": "Some CPU", "cores": 2, "flags": [], "memory_gib": 4},
        "versions": {"torch": "2.15.0", "fastkd": "0.1.0", "python": "3.11"},
        "cpu_path": "avx512",
        "threads": 2,
        "date": "2026-01-01T00:00:00+00:00",
        "command": ["pytest", "--benchmark"],
        "commit": None,
        "seconds": 400,
        "groups": groups,
    }


def test_geometric_mean() -> None:
    assert verdicts.geometric_mean([2, 8]) == pytest.approx(4)
    for bad in ([], [1.0, 0.0]):
        with pytest.raises(ValueError):
            verdicts.geometric_mean(bad)


def test_goals(result: dict[str, Any]) -> None:
    found = {v.goal.title: v for v in verdicts.verdicts(result)}
    eager = found["AT, CIFAR chains: eager ÷ cpp"]
    assert (
        eager.values == {"resnet20-64": 8, "resnet20-128": 8}
        and eager.mean == pytest.approx(8)
        and eager.reached
    )
    compiled = found["AT, CIFAR chains: torch.compile ÷ cpp"]
    assert compiled.mean == pytest.approx(8**0.5) and compiled.reached
    assert compiled.shortfalls == {"resnet20-64": 2}
    floor = found["AT, CIFAR chains at batch 128: cpp ÷ plain add"]
    assert not floor.reached and floor.shortfalls == {"resnet20-128": 2}
    # one thread is judged apart
    assert found["AT, CIFAR chains, 1 thread: eager ÷ cpp"].values == {"resnet20-64": 0.03}
    assert found["AT: channels_last ÷ NCHW"].values == {"resnet20-64": 1.5}
    assert found["AT: extra memory"].mean == pytest.approx(1.5)
    assert found["FSP: eager broadcast form ÷ cpp"].mean == pytest.approx(100)
    assert found["AT training: toolkit's loop ÷ ours in bfloat16"].values == {"resnet20 > resnet20": 4}
    assert found["AT training: toolkit's loop ÷ ours, float32"].mean == pytest.approx(1.6)
    assert not found["AT training: the loss's share of a step, float32"].reached
    lines = "\n".join(verdicts.lines(result))
    assert "NOT REACHED; short: resnet20-128 2.00" in lines


def test_a_busy_machine_judges_nothing_and_shows_one_thread_alone(result: dict[str, Any]) -> None:
    for record in result["groups"]:
        record |= {"waiting": 1.01, "spread": 1.1}
    assert quiet.why_not_judged(result) is None and verdicts.lines(result)
    for key, value in (("waiting", 1.3), ("spread", 1.5)):
        busy = copy.deepcopy(result)
        for record in busy["groups"]:
            record[key] = value
        first, *lines = summary(busy)
        assert first.startswith("THE MACHINE WAS NOT QUIET") and f"{value:.2f}" in first
        assert verdicts.verdicts(busy) == [] and "goals" not in "".join(lines)
        (row,) = (line.split() for line in lines if line.startswith("AT "))
        assert row == ["AT", "resnet20-64", "fp32", "nchw", "fwd+bwd", "1", "0.03"]
        page = report.full(busy)
        assert first in page and "milliseconds" not in page and page.count("| AT |") == 1


def test_docs_have_a_line_and_a_bar_for_each_loss(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = {
        "published": {"milliseconds": 300, "extra_memory": 4_000_000},
        "fastkd": {"milliseconds": 20, "extra_memory": 500_000},
    }
    crd = {"method": "crd", "case": "N 9", "threads": 1, "clock": "process", "rows": rows}
    fast = copy.deepcopy({**crd, "method": "ofd", "case": "batch 64"})
    fast["rows"]["fastkd"]["milliseconds"] = 3
    at = record("attention", "resnet20-128", {"eager": 14, "cpp": 2}, threads=1, clock="process")
    result["groups"] += [crd, fast, at]
    page, file = tmp_path / "page.md", tmp_path / "speed.json"
    page.write_text("above\n<!-- speed:begin -->old<!-- speed:end -->\nbelow\n")
    file.write_text(json.dumps(result))
    report.main([str(file), "--docs", str(page)])
    text = page.read_text()
    first, second, third = (line for line in text.splitlines() if line.startswith(("| ofd", "| crd", "| at")))
    assert first == "| ofd | batch 64 | 300 | 3.00 | 100 | 4 | 4.0 | 0.5 |"
    assert second == "| crd | N 9 | 300 | 20.0 | 15.0 (short) | 20 | 4.0 | 0.5 |"
    assert third == "| at | resnet20-128 | 14.0 | 2.00 | 7.00 | 7 |  |  |"
    assert text.startswith("above") and text.endswith("below\n") and "old" not in text
    assert "<svg" in page.with_suffix(".svg").read_text() and not file.with_suffix(".md").exists()
    for measured in result["groups"]:
        measured |= {"waiting": 2.0, "spread": 1.0}
    file.write_text(json.dumps(result))
    report.main([str(file), "--docs", str(page), "--no-plot"])
    assert "| crd | N 9 | 15.0 | 20 | 4.0 | 0.5 |" in page.read_text() and "NOT QUIET" in page.read_text()


def test_docs_have_the_ratio_of_a_whole_step(result: dict[str, Any], tmp_path: Path) -> None:
    loss = {
        "method": "crd",
        "case": "N 9",
        "threads": 1,
        "clock": "process",
        "rows": {"published": {"milliseconds": 300}, "fastkd": {"milliseconds": 10}},
    }
    other, step = (
        {**loss, "method": "rkd"},
        {**loss, "method": "crd step", "case": "resnet", "of": ["crd", "N 9"]},
    )
    step["rows"] = {"published": {"milliseconds": 900}, "fastkd": {"milliseconds": 300}}
    result["groups"] += [loss, other, step, {**step, "clock": "wall", "threads": 2}]
    page, file = tmp_path / "page.md", tmp_path / "speed.json"
    page.write_text("<!-- speed:begin --><!-- speed:end -->")

    def rows() -> list[str]:
        file.write_text(json.dumps(result))
        report.main([str(file), "--docs", str(page), "--no-plot"])
        return [
            line for line in page.read_text().splitlines() if line.startswith(("| loss", "| crd", "| rkd"))
        ]

    heads, *lines = rows()
    assert heads.endswith("fastkd, MB | step ÷ | step's goal |")
    assert lines[0] == "| crd | N 9 | 300 | 10.0 | 30.0 | 20 |  |  | 3.00 | 2.8 |"
    assert lines[1] == "| rkd | N 9 | 300 | 10.0 | 30.0 |  |  |  |  |  |" and len(lines) == 2
    found = {v.goal.title: v.values for v in verdicts.verdicts(result)}
    assert found["crd step: published ÷ fastkd"] == {"resnet": 3}
    assert found["crd: published ÷ fastkd"] == {"N 9": 30}
    step["rows"]["fastkd"]["milliseconds"] = 450
    assert rows()[1].endswith("| 2.00 (short) | 2.8 |")
    for measured in result["groups"]:
        measured |= {"waiting": 2.0, "spread": 1.0}
    assert rows()[1] == "| crd | N 9 | 30.0 | 20 |  |  | 2.00 | 2.8 |"


def test_a_thread_that_waits_for_a_processor_is_noticed() -> None:
    """Clocks of our own: the processor's goes on by a millisecond a look, the wall's by so many."""

    def clock(step: float) -> Any:
        readings = itertools.count()
        return lambda: step * next(readings)

    # the processor's clock is looked at three times between two looks at the wall's
    assert quiet.waiting(clock(0.001), clock(0.002)) == pytest.approx(1)
    assert quiet.waiting(clock(0.001), clock(0.006)) == pytest.approx(3)
    assert quiet.spread([[1.0] * 9, [1.0, 2.0, 3.0, 4.0, 5.0], [7.0]]) == pytest.approx((1 + 4 / 2) / 2)


def test_table(result: dict[str, Any]) -> None:
    wrong = copy.deepcopy(result)
    wrong["groups"][0]["rows"]["torch.compile"] = {"failed": "wrong: relative error 3"}
    heads, lines = table.grid(wrong)
    assert len(lines) == 6 and all(len(line) == len(heads) for line in lines)
    assert lines[0][heads.index("compile")] == "WRONG" and lines[0][heads.index("÷compile")] == ""
    assert (
        lines[0][heads.index("÷eager")] == "8.00"
        and lines[4][0] == "FSP broadcast"
        and lines[4][heads.index("÷eager")] == "100"
    )
    assert any("1280" in line for line in table.lines(result))
    (row,) = (row for row in table.loops(result)[1] if row[2] == "loop, float32")
    assert row == ["AT", "resnet20 > resnet20", "loop, float32", "512", "1.60", "4.0%"]


def test_results_are_saved_or_not(result: dict[str, Any], tmp_path: Path) -> None:
    assert str(tmp_path / "new" / "speed.json") in save(result, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "speed.json").read_text()) == result
    (tmp_path / "file").write_text("")
    assert "not saved" in save(result, tmp_path / "file")


def test_each_file_that_was_written_has_a_line(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = {"published": {"milliseconds": 3}, "fastkd": {"milliseconds": 1}}
    result["groups"].append({"method": "crd", "case": "N 9", "threads": 1, "clock": "process", "rows": rows})
    save(result, tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- speed:begin --><!-- speed:end -->")
    source = str(tmp_path / "speed.json")
    for words, names in (
        (["--readme", str(page)], ["speed.md", "speed.svg", "page.md"]),
        (["--no-plot"], ["speed.md"]),
        (["--docs", str(page)], ["page.svg", "page.md"]),
    ):
        for name in names:
            if name != "page.md":
                (tmp_path / name).unlink(missing_ok=True)
        report.main([source, *words])
        assert capsys.readouterr().out.splitlines() == [f"written: {tmp_path / name}" for name in names]
        assert all((tmp_path / name).stat().st_size for name in names)


def test_report(result: dict[str, Any], tmp_path: Path) -> None:
    folder, readme = tmp_path / "some-cpu", tmp_path / "README.md"
    save(result, folder)
    readme.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n")
    report.main([str(folder / "speed.json"), "--readme", str(readme), "--no-plot"])
    text = readme.read_text()
    assert (
        text.startswith("before\n<!-- speed:begin -->")
        and text.endswith("<!-- speed:end -->\nafter\n")
        and "old" not in text
    )
    assert "Some CPU" in text and "| AT |" in text.replace("attention", "AT")
    assert (folder / "speed.md").read_text().count("|") > 20
    report.main([str(folder / "speed.json"), "--readme", str(readme), "--no-plot"])
    assert readme.read_text() == text


def test_results_of_a_gpu_alone_are_not_taken_unasked(result: dict[str, Any], tmp_path: Path) -> None:
    of_gpu = [{**group, "device": "cuda"} for group in result["groups"]]
    for name, day, groups in (("old", 1, None), ("new", 2, None), ("gpu", 3, of_gpu)):
        (tmp_path / name).mkdir()
        changed = {**result, "date": f"2026-01-0{day}", "groups": groups or result["groups"]}
        (tmp_path / name / "speed.json").write_text(json.dumps(changed))
    assert report.newest(tmp_path).parent.name == "new"


def test_report_needs_the_markers(result: dict[str, Any], tmp_path: Path) -> None:
    save(result, tmp_path)
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(SystemExit, match="speed:begin"):
        report.main([str(tmp_path / "speed.json"), "--readme", str(tmp_path / "README.md"), "--no-plot"])


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save(result, tmp_path)
    report.main([str(tmp_path / "speed.json")])
    assert b"<svg" in (tmp_path / "speed.svg").read_bytes()
