"""benchmarks/gpu.py: no part outlives it, whatever happens while it starts or ends them, and parts begin
where there is room.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_command import gone, python, summary
from speed import gpu_files, gpu_run
from speed.gpu_plan import ROOT
from speed.gpu_run import BEFORE_MEASURING, Part, Run, execute

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"
UNTIL = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
TOUCH = "import pathlib; pathlib.Path({!r}).touch()\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """It hears SIGTERM, as the command does."""
    monkeypatch.setattr(gpu_run, "STOPPING", 0.6)
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)
    with Run(tmp_path / "out", 1, rehearse=True) as made:
        before = signal.signal(signal.SIGTERM, made.signalled)
        yield made
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def begun(run: Run, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Of each part that was begun what ran then."""
    found, begin = [], run.begin

    def noted(part: Part, seconds: float) -> None:
        found.append((part.name, [one.part.name for one in run.running]))
        begin(part, seconds)

    monkeypatch.setattr(run, "begin", noted)
    return found


class Popen(subprocess.Popen):
    """Keeps the processes; the one with this number ends with a signal to the command."""

    pids: list[int]
    signals_at = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pids.append(self.pid)
        if len(self.pids) == self.signals_at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> type[Popen]:
    monkeypatch.setattr(gpu_run.subprocess, "Popen", Popen)
    monkeypatch.setattr(Popen, "pids", [], raising=False)
    return Popen


def statuses(run: Run) -> dict[str, Any]:
    return {part["name"]: part["status"] for part in run.summary["parts"]}


def test_a_second_signal_ends_nothing_before_its_parts(run: Run, started: type[Popen]) -> None:
    timers = [threading.Timer(s, os.kill, (os.getpid(), signal.SIGTERM)) for s in (0.5, 0.8)]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        execute(run, [python("one", DEAF)], [python("b1", DEAF), python("b2", DEAF)])
    for timer in timers:
        timer.join()
    assert len(started.pids) == 3 and all(gone(pid) for pid in started.pids)
    assert statuses(run) == {"one": "stopped", "b1": BEFORE_MEASURING, "b2": BEFORE_MEASURING}


@pytest.mark.parametrize("number", [1, 2])
def test_a_part_that_was_just_started_is_known(
    run: Run, started: type[Popen], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(started, "signals_at", number)
    with pytest.raises(KeyboardInterrupt):
        execute(run, [python("one", DEAF)], [python("b1", DEAF), python("b2", DEAF)])
    assert len(started.pids) == number and all(gone(pid) for pid in started.pids)
    assert [*statuses(run)] == ["one", "b1"][:number]


def test_a_signal_at_the_end_keeps_no_part_running(
    run: Run, started: type[Popen], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = run.stop

    def signalled(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stop(*given)

    monkeypatch.setattr(run, "stop", signalled)
    execute(run, [python("one", "")], [python("behind", DEAF)])
    assert run.stopped and all(gone(pid) for pid in started.pids)
    assert statuses(run) == {"one": 0, "behind": BEFORE_MEASURING}


def test_what_cannot_be_written_keeps_no_part_running(run: Run, started: type[Popen]) -> None:
    """As on a full disk."""
    for name in ("gpu-outputs.txt", "gpu-summary.json"):
        (run.out / name).unlink(missing_ok=True)
        (run.out / name).mkdir()
    parts = [python("one", "print(1)"), python("other", "print(2)")]
    execute(run, parts, [python("b1", DEAF), python("b2", DEAF)])
    assert len(started.pids) == 4 and all(gone(pid) for pid in started.pids)
    log = (run.out / "gpu.log").read_text()
    assert log.count("not packed: ") == 1 and "one: gpu-outputs.txt lacks what it printed" in log
    assert "other: ok" in log and not [*run.out.glob(".*.tmp")]


def test_what_is_renamed_while_it_is_packed_is_passed_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kept.txt", "renamed.txt", ".smoke.tmp", ".rates.tmp", "best.pt"):
        (run.staging / name).write_text(name)
    walk = os.walk

    def late(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        found = [*walk(folder)]
        for name in ("renamed.txt", ".smoke.tmp"):
            (run.staging / name).unlink()
        yield from found

    monkeypatch.setattr(gpu_files.os, "walk", late)
    run.pack()
    assert "not packed" not in (run.out / "gpu.log").read_text()
    with tarfile.open(run.out / "gpu-results.tar.gz") as archive:
        assert archive.getnames() == ["gpu-results/kept.txt"]
        assert archive.extractfile("gpu-results/kept.txt").read() == b"kept.txt"


def of(processes: int, part: Part) -> Part:
    return Part(part.name, part.command, part.seconds, measures=part.measures, processes=processes)


def test_as_many_processes_run_as_there_is_room_for(
    run: Run, begun: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "ROOM", 4)
    b, c = (str(tmp_path / name) for name in "bc")
    parts = [
        of(2, python("a", UNTIL.format(b))),
        of(1, python("b", TOUCH.format(b) + UNTIL.format(c))),
        of(3, python("c", TOUCH.format(c))),
        of(9, python("d", "")),
    ]
    execute(run, parts)
    # what is larger than the room begins when nothing else is waited for
    assert begun == [("a", []), ("b", ["a"]), ("c", ["b"]), ("d", [])]


@pytest.mark.parametrize(("room", "beside"), [(1, ["tests"]), (3, ["tests"]), (4, ["tests", "x"])])
def test_what_compiles_begins_where_checks_leave_room(
    run: Run, begun: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, beside: list[str]
) -> None:
    """One in any case, and none once something is measured."""
    monkeypatch.setattr(gpu_run, "ROOM", room)
    second = str(tmp_path / "second")
    compiling = [python("x", ""), python("y", TOUCH.format(second) + DEAF), of(5, python("z", ""))]
    parts = [
        of(2, python("tests", UNTIL.format(second))),
        python("rates", "", measures=True),
        python("more", "", measures=True),
    ]
    execute(run, parts, (), compiling)
    assert begun == [("tests", []), ("x", ["tests"]), ("y", beside), ("rates", []), ("more", [])]
    assert statuses(run)["y"] == BEFORE_MEASURING and statuses(run)["more"] == 0


def test_a_part_that_checks_waits_for_one_that_measures(
    run: Run, begun: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "ROOM", 4)
    measures = python("rates", "import time; time.sleep(0.3)", measures=True)
    execute(run, [measures, python("check", "")])
    assert begun == [("rates", []), ("check", [])]


def test_a_part_that_cannot_be_started_is_reported(run: Run) -> None:
    execute(run, [Part("lacks", ("a-command-that-is-not-there",), 9), python("next", "")])
    assert statuses(run) == {"lacks": "not started", "next": 0}
    assert summary(run.out)["parts"][0]["last"] == "No such file or directory: a-command-that-is-not-there"


@pytest.mark.parametrize("status", [0, 3])
def test_what_is_stopped_before_measuring_is_no_failure(tmp_path: Path, status: int) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
from speed.gpu_run import Part
python = sys.executable, "-S", "-c"
gpu.plan = lambda rehearse: [
    Part("first", (*python, ""), 20),
    Part("rates", (*python, "raise SystemExit({status})"), 20, measures=True),
]
gpu.training = lambda data, rehearse: [Part("training", (*python, "import time; time.sleep(30)"), 0)]
gpu.compiling = lambda rehearse: []
sys.modules["emulated"] = type(sys)("emulated")
sys.modules["emulated"].build = lambda: None
sys.argv = ["gpu.py", "--rehearse", "--out", {str(tmp_path)!r}]
sys.exit(gpu.main())
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == (status != 0), done.stdout + done.stderr
    assert [part["status"] for part in summary(tmp_path)["parts"]] == [0, BEFORE_MEASURING, status]


def test_its_folder_goes_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "out", 1, rehearse=True) as run:
        (run.staging / "speed").mkdir()
        assert run.staging.parent == temporary
        raise KeyboardInterrupt
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Run(tmp_path / "file" / "out", 1, rehearse=True)
    assert not [*temporary.iterdir()]
