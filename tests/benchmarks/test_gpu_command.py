"""benchmarks/gpu.py: limits hold, results lie there whatever stops it, and nothing else runs while it
measures.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from gpu_command import gone, python, ran, summary
from speed import gpu_run
from speed.gpu_run import Run, execute

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """What a shell's & or nohup has told this process to ignore, and so what it starts, is heard here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of many processors too."""
    monkeypatch.setattr(gpu_run, "ROOM", 1)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "GRACE", 0.5)


def test_each_part_is_packed_and_a_failure_stops_nothing(tmp_path: Path) -> None:
    wrote = (
        "import os, pathlib; pathlib.Path(os.environ['FASTKD_GPU_OUT'], 'rates.json').write_text('{\"copy\":"
        " 1}'); print('copied')"
    )
    found = ran(tmp_path, [python("fails", "print('seen'); raise SystemExit(3)"), python("writes", wrote)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-outputs.txt",
        "gpu-results.tar.gz",
        "gpu-summary.json",
        "gpu.log",
    ]
    assert [(part["name"], part["status"], part["last"]) for part in found["parts"]] == [
        ("fails", 3, "seen"),
        ("writes", 0, "copied"),
    ]
    assert found["rates"] == {"copy": 1}
    assert (
        "seen" in (tmp_path / "gpu-outputs.txt").read_text()
        and "status 3" in (tmp_path / "gpu.log").read_text()
    )
    with tarfile.open(tmp_path / "gpu-results.tar.gz") as archive:
        assert "gpu-results/rates.json" in archive.getnames()


def test_parts_find_packages_that_were_carried_along(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "carried"))
    printing = "import os; print(*os.environ['PYTHONPATH'].split(os.pathsep), sep='\\n')"
    ran(tmp_path / "out", [python("path", printing)])
    text = (tmp_path / "out" / "gpu-outputs.txt").read_text().splitlines()
    folders = [line for line in text if line.startswith(os.sep)]
    assert folders[0] == str(ROOT) and folders[-1] == str(tmp_path / "carried")


def test_a_part_at_its_limit_may_still_say_what_it_found(tmp_path: Path) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('two failed')"
    found = ran(tmp_path, [python("slow", code, seconds=3), python("next", "print('after')")])
    assert [(part["status"], part["last"]) for part in found["parts"]] == [
        ("stopped at its limit", "two failed"),
        (0, "after"),
    ]


def test_what_a_part_has_printed_is_packed_while_it_runs(tmp_path: Path, monkeypatch) -> None:
    """SIGKILL of the command itself then loses some seconds of it."""
    monkeypatch.setattr(gpu_run, "PACK_EVERY", 0.2)
    code = f"""
import pathlib, tarfile, time
print("seen", flush=True)
archive = pathlib.Path({str(tmp_path / "gpu-results.tar.gz")!r})
found = b""
while b"seen" not in found:
    time.sleep(0.05)
    if archive.exists():
        found = tarfile.open(archive).extractfile("gpu-results/slow.txt").read()
print("packed")
"""
    found = ran(tmp_path, [python("slow", code, seconds=8)])
    assert [(part["status"], part["last"]) for part in found["parts"]] == [(0, "packed")]


def test_what_ignores_the_interrupt_and_its_children_are_killed(tmp_path: Path, short: None) -> None:
    code = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.fork() or"
        " os.getpid(), flush=True); time.sleep(60)"
    )
    ran(tmp_path, [python("deaf", code, seconds=3)])
    pids = [int(line) for line in (tmp_path / "gpu-outputs.txt").read_text().splitlines() if line.isdigit()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_the_whole_keeps_to_its_time_and_names_what_is_left_out(tmp_path: Path, short: None) -> None:
    begun = time.monotonic()
    parts = [python(name, "import time; time.sleep(60)") for name in ("first", "second", "third")]
    ran(tmp_path, parts, minutes=10 / 60)
    assert time.monotonic() - begun < 11
    assert "third: left out, no time" in (tmp_path / "gpu.log").read_text()


def test_training_goes_on_until_something_is_measured(tmp_path: Path, short: None) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)"
    training = python(
        "training", f"import pathlib, time; pathlib.Path({str(tmp_path / 'began')!r}).touch(); time.sleep(60)"
    )
    parts = [
        python("facts", ""),
        python("test", wait.format(str(tmp_path / "began"))),
        python("rates", "", measures=True),
    ]
    found = ran(tmp_path, parts, [training])
    assert [(part["name"], part["status"]) for part in found["parts"]] == [
        ("facts", 0),
        ("test", 0),
        ("training", "stopped before measuring"),
        ("rates", 0),
    ]


TRAIN = """
import pathlib, sys, time
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1], "run")
output.mkdir(parents=True)
try:
    pathlib.Path(__file__).with_name("began").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # as long as writing takes
    for name in ("last.pt", "log.txt"):
        (output / name).write_text("an epoch")
    sys.exit(130)
"""


def test_a_training_run_that_is_stopped_writes_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    code = f"""
import pathlib, sys
from speed import gpu_training
gpu_training.ROOT = pathlib.Path({str(tmp_path)!r})
sys.argv = ["gpu_training.py", "digits"]
sys.exit(gpu_training.main())
"""
    began = str(tmp_path / "began")
    wait = f"import pathlib, time\nwhile not pathlib.Path({began!r}).exists(): time.sleep(0.01)"
    parts = [python("facts", ""), python("test", wait), python("rates", "", measures=True)]
    with Run(tmp_path / "out", 1, rehearse=True) as run:
        execute(run, parts, [python("training", code)])
        assert (run.staging / "runs" / "teacher" / "run" / "last.pt").read_text() == "an epoch"
    assert [part["status"] for part in summary(tmp_path / "out")["parts"]] == [
        0,
        0,
        "stopped before measuring",
        0,
    ]
    with tarfile.open(tmp_path / "out" / "gpu-results.tar.gz") as archive:
        assert "gpu-results/runs/teacher/run/log.txt" in archive.getnames()


def started(tmp_path: Path, *before: str) -> subprocess.Popen[str]:
    """The command with two parts, in the second, which ends once there is a file "enough"; ``before``: words
    of the command line that start it.
    """
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu
from speed.gpu_run import Part
sleep = '''
import os, pathlib, time
try:
    pathlib.Path({str(tmp_path / "begins")!r}).write_text(str(os.getpid()))
    os.rename({str(tmp_path / "begins")!r}, {str(tmp_path / "began")!r})
    while not pathlib.Path({str(tmp_path / "enough")!r}).exists():
        time.sleep(0.02)
    print("all of it")
except KeyboardInterrupt:
    print("half of it")
'''
gpu.plan = lambda rehearse: [
    Part("first", (sys.executable, "-S", "-c", "print('found')"), 20),
    Part("second", (sys.executable, "-S", "-c", sleep), 30),
]
gpu.training = lambda data, rehearse: []
sys.modules["emulated"] = type(sys)("emulated")
sys.modules["emulated"].build = lambda: None
sys.argv = ["gpu.py", "--rehearse", "--out", {str(tmp_path / "out")!r}]
sys.exit(gpu.main())
"""
    command = [*before, sys.executable, "-S", "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_command_that_is_stopped_keeps_what_it_found(tmp_path: Path, number: int) -> None:
    process = started(tmp_path)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "stopped; what was found is kept" in said
    found = [(part["status"], part["last"]) for part in summary(tmp_path / "out")["parts"]]
    assert found == [(0, "found"), ("stopped", "half of it")]
    assert "half of it" in (tmp_path / "out" / "gpu-outputs.txt").read_text()


def test_nothing_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    process = started(tmp_path)
    part = int((tmp_path / "began").read_text())
    process.kill()
    process.communicate(timeout=30)
    assert gone(part)


def test_behind_nohup_the_command_outlives_its_terminal(tmp_path: Path) -> None:
    process = started(tmp_path, "sh", "-c", "trap '' HUP; exec \"$@\"", "sh")
    process.send_signal(signal.SIGHUP)
    (tmp_path / "enough").touch()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "stopped" not in said
    found = [(part["status"], part["last"]) for part in summary(tmp_path / "out")["parts"]]
    assert found == [(0, "found"), (0, "all of it")]


def test_facts_need_no_tools(tmp_path: Path) -> None:
    """Neither git nor nvidia-smi, and no compiler."""
    folders = [str(ROOT / name) for name in (".", "benchmarks", "tests/helpers")]
    env = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(folders), "FASTKD_GPU_REHEARSAL": "1"}
    env |= {"FASTKD_GPU_OUT": str(tmp_path), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "speed.gpu_parts", "facts"]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["commit"] is None


def test_a_wrong_argument_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--rehearse", "--out", str(tmp_path)]
    for arguments, word in ((["--only", "tests of rocm"], "tests of cuda"), (["--minutes", "0"], "above 0")):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and word in done.stderr.splitlines()[-1]
