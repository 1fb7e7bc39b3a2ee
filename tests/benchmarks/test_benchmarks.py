"""The instrument of `pytest --benchmark`: its option, its selection, its arithmetic and its report."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from speed import against, cases, goals, machine, measure, rows, table
from speed.measure import Row
from speed.session import Replay, save
from speed.stock import Stock

from fastkd import reference

ROOT = Path(__file__).resolve().parents[2]


def run_pytest(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    environment.pop("TRITON_INTERPRET", None)  # of these tests, not of who runs the command
    # a run of its own
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=300)


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


# the option


@pytest.mark.parametrize("place", [".", "tests", "/"])
def test_option_is_known_everywhere(place: str) -> None:
    done = run_pytest(
        "--benchmark", "--co", "-q", str(ROOT / "tests" / "methods" / "test_kd.py"), cwd=ROOT / place
    )
    assert "unrecognized" not in done.stderr and done.returncode == 5, done.stdout + done.stderr


def test_only_benchmarks_on_full_shapes() -> None:
    done = run_pytest("--benchmark", "--co", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert tests and all(line.startswith("benchmarks/") for line in tests)
    assert any("resnet50-8" in line for line in tests) and not any("small" in line for line in tests)
    assert {line.split("::")[0] for line in tests} == {
        f"benchmarks/test_{name}.py" for name in ("attention", "fsp", "loop", "step")
    }


@pytest.mark.parametrize("options", [("--benchmark-disable",), ("-n", "1")], ids=" ".join)
def test_measuring_is_refused_where_it_would_measure_nothing(options: tuple[str, ...]) -> None:
    if options[0] == "-n":
        pytest.importorskip("xdist")
    done = run_pytest("--benchmark", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("ERROR: --benchmark measures") and options[0] in line


def test_ordinary_run_is_small() -> None:
    done = run_pytest("--co", "-q", "benchmarks/test_attention.py", "tests/methods/test_kd.py")
    tests = [line for line in done.stdout.splitlines() if "benchmarks/" in line]
    assert tests and all("-small-" in line for line in tests)
    assert any("tests/" in line for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_run_is_recorded(tmp_path: Path) -> None:
    """One tiny group, measured, in pytest-benchmark's JSON and in ours."""
    ids = "tiny and forward-1-thread"
    done = run_pytest(
        "--benchmark",
        "-q",
        "-k",
        ids,
        "--benchmark-json",
        str(tmp_path / "theirs.json"),
        f"--benchmark-results={tmp_path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours = json.loads((tmp_path / "speed.json").read_text())
    theirs = json.loads((tmp_path / "theirs.json").read_text())["benchmarks"]
    (group,) = ours["groups"]
    assert group["threads"] == 1 and group["clock"] == "process" and len(theirs) == len(group["rows"])
    for bench in theirs:
        row = group["rows"][next(name for name in group["rows"] if bench["name"].endswith(f"-{name}]"))]
        assert 1e3 * bench["stats"]["median"] == pytest.approx(row["milliseconds"])
        assert bench["stats"]["rounds"] == row["rounds"] >= 5 and bench["extra_info"]["threads"] == 1
    assert "AT" in done.stdout and "above torch.relu" in done.stdout


# measuring


def test_interleaved_rounds() -> None:
    turns: list[str] = []

    def row(name: str) -> Row:
        return Row(name, lambda: None, turn=lambda calls, warm, clock: turns.append(name) or 0.2)

    made = [row("a"), row("b"), row("c")]
    measure.interleave(made, "wall", budget=1)
    assert [len(r.seconds) for r in made] == [5, 5, 5]
    assert "".join(turns[-15:]) == "abc" + "bca" + "cab" + "abc" + "bca"


def test_a_row_that_raises_is_left_out() -> None:
    def broken() -> None:
        raise ValueError("no")

    made = [Row("good", lambda: None), Row("bad", broken)]
    measure.interleave(made, "process", budget=0)
    assert made[0].seconds and not made[1].seconds and made[1].failed == "ValueError: no"


def test_peak_memory_is_exact() -> None:
    def run() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        torch.empty(100)
        del b

    run()
    assert 6000 <= measure.peak_memory(run) <= 6000 + 2 * 64  # the allocator rounds up


@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_a_wrong_row_has_no_speed(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.Case("fsp", "small")
    monkeypatch.setitem(rows.FUSED, "fsp", lambda s, t: (1 + error) * reference.fsp_loss(s, t))
    built = rows.Rows(case, False, Stock())
    row = built.row(case, "reference")
    built.check(case, row)
    assert (row.failed or "").startswith("wrong: relative error") == bool(error)
    assert row.facts["error"] == pytest.approx({"loss": error, "gradient": error}, abs=1e-5)


def test_replayed_times() -> None:
    clock = Replay()
    clock.load([3.0, 5.0])
    differences = []
    for _ in range(2):
        begun = clock()
        differences.append(clock() - begun)
    assert differences == [3.0, 5.0] and clock() == 0.0


def test_bytes_and_products() -> None:
    case = cases.Case("fsp", "resnet20-64")
    values = 64 * (16 * 1024 + 16 * 1024 + 32 * 256 + 64 * 64)
    assert case.bytes_moved() == 3 * 4 * values
    assert case.flops() == 4 * 2 * 64 * (16 * 16 * 1024 + 16 * 32 * 256 + 32 * 64 * 64)
    assert case.unit_of_memory() == 4 * 64 * (16 * 16 + 16 * 32 + 32 * 64)
    assert cases.Case("attention", "resnet20-64").unit_of_memory() == 4 * 64 * (1024 + 256 + 64)


# what is made of it


def test_geometric_mean() -> None:
    assert goals.geometric_mean([2, 8]) == pytest.approx(4)
    for bad in ([], [1.0, 0.0]):
        with pytest.raises(ValueError):
            goals.geometric_mean(bad)


def test_goals(result: dict[str, Any]) -> None:
    found = {v.goal.title: v for v in goals.verdicts(result)}
    eager = found["AT, CIFAR chains: eager ÷ cpp"]
    assert (
        eager.values == {"resnet20-64": 8, "resnet20-128": 8}
        and eager.mean == pytest.approx(8)
        and eager.reached
    )
    compiled = found["AT, CIFAR chains: torch.compile ÷ cpp"]
    assert compiled.mean == pytest.approx(8**0.5) and compiled.reached and not compiled.shortfalls
    floor = found["AT, CIFAR chains: cpp ÷ streaming floor"]
    assert not floor.reached and floor.shortfalls == {"resnet20-128": 2}
    assert found["AT: channels_last ÷ NCHW"].values == {"resnet20-64": 1.5}
    assert found["AT: extra memory"].mean == pytest.approx(1.5)
    assert found["FSP: eager broadcast form ÷ cpp"].mean == pytest.approx(100)
    assert found["AT training: toolkit's loop ÷ ours in bfloat16"].values == {"resnet20 > resnet20": 4}
    assert found["AT training: toolkit's loop ÷ ours, float32"].mean == pytest.approx(1.6)
    assert not found["AT training: the loss's share of a step, float32"].reached
    lines = "\n".join(goals.lines(result))
    assert "NOT REACHED; short: resnet20-128 2.00" in lines


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


def test_slug() -> None:
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.60GHz") == "intel-xeon-processor-2-60ghz"


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


def test_two_trees_take_turns_in_processes_of_their_own(capsys, tmp_path):
    ratio = against.compare(ROOT, ROOT, rounds=1)
    table = capsys.readouterr().out
    assert 0.05 < ratio < 20 and all(f"{loss:24} {way}" in table for loss, way in against.CASES)
    with pytest.raises(SystemExit, match=f"wanted the tree {tmp_path}"):
        against.Tree(tmp_path)
