"""What a command prints to decides nothing: a screen that fails is given up, and what it cannot print is
replaced.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from record_files import rows_of
from support_data import QUICK

from fastkd.io.console import screens
from fastkd.report import command as report
from fastkd.training.progress import Progress
from fastkd.training.settings import VARIABLES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """The line that repeats a run begins with such variables where they are set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def broken(kind):
    """A stream that fails as the system would have it."""
    if kind == "full disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        return open("/dev/full", "w")
    if kind == "closed":
        with open(os.devnull, "w") as stream:
            return stream
    gone, ours = os.pipe() if kind == "no reader" else os.openpty()  # the terminal's end and the process's
    os.close(gone)
    return open(ours, "w")


@pytest.mark.parametrize("kind", ["no reader", "terminal gone", "full disk", "closed"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_screen_that_fails_is_given_up_with_one_line_and_training_goes_on(
    small_main, monkeypatch, tmp_path, capsys, kind, stream
):
    screen = broken(kind)
    monkeypatch.setattr(sys, stream, screen)
    if stream == "stderr":  # which a run writes to only on a terminal, without tqdm once in ten seconds
        monkeypatch.setattr(
            Progress, "advance", lambda self, describe: print("a line", file=sys.stderr, flush=True)
        )
    status = small_main(["--method", "baseline", *QUICK, "--epochs", "2", "--output", str(tmp_path)])
    monkeypatch.undo()
    with suppress(OSError):  # what its buffer still holds
        screen.close()
    assert status == 0
    log = next(tmp_path.glob("baseline-*/log.txt")).read_text()
    assert (
        log.count("cannot be written") == 1
        and f"{stream} cannot be written: " in log
        and "; going on without it\n" in log
    )
    assert (
        "baseline epoch 2/2" in log
        and "again    python" in log
        and len((tmp_path / "results.csv").read_text().splitlines()) == 2
    )


def test_a_run_needs_no_screen_at_all(small_main, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "0", "--output", str(tmp_path)]) == 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_command_ends_well_though_its_reader_left(tmp_path):
    """As in ``train.py ... 2>&- | head -3``: no buffer is left to fail when the interpreter ends."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--method",
        "baseline",
        *QUICK,
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("PYTHONUNBUFFERED", None)
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=environment)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=300) == 0
    assert (tmp_path / "err").read_text() == ""
    assert "stdout cannot be written: Broken pipe" in next(tmp_path.glob("baseline-*/log.txt")).read_text()
    assert [row["method"] for row in rows_of(tmp_path)] == ["baseline"]


def test_no_file_takes_the_place_of_a_closed_screen(tmp_path):
    """The number of a closed stderr would go to the next file, and C++ libraries print to that number."""
    child = os.fork()
    if child == 0:
        os.close(2)
        with screens():
            taken = os.open(tmp_path / "last.pt", os.O_WRONLY | os.O_CREAT)
            os._exit(taken == 2 or os.fstat(2).st_rdev != os.stat(os.devnull).st_rdev)
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_screen_cannot_print_is_replaced(small_main, monkeypatch, tmp_path):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert (
        small_main(
            ["--method", "baseline", *QUICK, "--epochs", "1", "--output", str(tmp_path), "--repeats", "2"]
        )
        == 0
    )
    last = written.getvalue().decode("ascii").splitlines()[-1]
    assert "(mean ? sample standard deviation)" in last and "2 runs, seeds 0 1" in last
    for encoding, sign in (("cp437", "±"), ("koi8-r", "?")):  # one has the character and the other not
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
        assert report.main([str(tmp_path)]) == 0
        assert f" {sign} " in written.getvalue().decode(encoding)


def test_a_report_that_could_not_be_written_says_so(monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken("full disk"))
        assert report.main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == "python -m fastkd.report: error: stdout cannot be written: No space left on device\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken("no reader"))
        assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
