"""The instrument of `pytest --benchmark`: its option, its selection, its arithmetic and its report."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from child_process import python
from speed import against, cases, gpu_step, measure, quiet, rows
from speed.measure import Row
from speed.session import Replay, Session
from speed.stock import Stock

import fastkd
from fastkd import reference

ROOT = Path(__file__).resolve().parents[2]


PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run_pytest(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A run of its own, whose environment is not that of these tests but of who runs the command."""
    foreign: dict[str, str | None] = {name: None for name in os.environ if name.startswith("PYTEST_XDIST")}
    foreign |= {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return python(PYTEST, "-p", "no:cacheprovider", *arguments, cwd=cwd, PYTHONPATH=path, **foreign)


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
        f"benchmarks/test_{name}.py" for name in ("attention", "fsp", "loop", "methods", "step")
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
    why = quiet.why_not_judged(ours)  # other tests may keep the machine busy
    assert "AT" in done.stdout and ("above torch.relu" if why is None else why) in done.stdout


@pytest.mark.slow
def test_rows_are_measured_without_pytest_benchmark(tmp_path: Path) -> None:
    chosen = ("benchmarks/test_attention.py", "-k", "tiny and forward-1-thread")
    results = f"--benchmark-results={tmp_path}"
    done = run_pytest("-p", "no:benchmark", "--benchmark", "-q", *chosen, results)
    assert done.returncode == 0, done.stdout + done.stderr
    (group,) = json.loads((tmp_path / "speed.json").read_text())["groups"]
    assert len(group["rows"]) > 2 and all(row["milliseconds"] > 0 for row in group["rows"].values())


def test_an_ordinary_run_goes_without_pytest_benchmark() -> None:
    done = run_pytest("-p", "no:benchmark", "-q", "benchmarks/test_attention.py", "-k", "small and eager")
    assert done.returncode == 0, done.stdout + done.stderr


def test_interleaved_rounds() -> None:
    turns: list[str] = []

    def row(name: str) -> Row:
        return Row(name, lambda: None, turn=lambda calls, warm, clock: turns.append(name) or 0.2)

    made = [row("a"), row("b"), row("c")]
    measure.interleave(made, "wall", budget=1)
    assert [len(r.seconds) for r in made] == [5, 5, 5]
    assert "".join(turns[-15:]) == "abc" + "bca" + "cab" + "abc" + "bca"


def test_a_backend_whose_first_kernel_fails_has_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(students: object, teachers: object) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setitem(rows.FUSED, "attention", broken)
    monkeypatch.setattr(rows.backends, "availability", lambda: {"cpp": (True, ""), "reference": (True, "")})
    assert rows.available_backends.__wrapped__() == ["cpp"]  # not what an earlier call found
    session, said = Session(False, lambda line: None), "RuntimeError: Failed to find C compiler"
    group = rows.LossGroup(cases.Case("attention", "small"), False)
    row = rows.Row("cpp", lambda: broken([], []))
    monkeypatch.setattr(group, "check", lambda built, row: row.run())
    session._check(group, None, row)
    assert row.failed == said


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


@pytest.mark.parametrize("form", [gpu_step.LOSS, gpu_step.TAP])
def test_a_step_on_a_gpu_whose_loss_is_wrong_has_no_speed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = gpu_step.GPUStepGroup(gpu_step.RESNET20, "cpu", False)
    built = group.build(Stock())
    right, wrong = (group.row(built, f"{form}, reference") for _ in range(2))
    group.check(built, right)
    assert right.failed is None and right.facts["error"]["loss"] < 2e-2
    factors, loss = iter((2, 1)), fastkd.attention_transfer_loss  # the row's, then that of the check
    monkeypatch.setattr(fastkd, "attention_transfer_loss", lambda *x, **y: next(factors) * loss(*x, **y))
    group.check(built, wrong)
    assert (wrong.failed or "").startswith("wrong: loss")


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


def test_two_trees_take_turns_in_processes_of_their_own(capsys, tmp_path):
    ratio = against.compare(ROOT, ROOT, rounds=1, processes=1)
    table = capsys.readouterr().out
    assert 0.05 < ratio < 20 and all(f"{loss:24} {way}" in table for loss, way in against.CASES)
    with pytest.raises(SystemExit, match=f"wanted the tree {tmp_path}"):
        against.Tree(tmp_path)
