"""Several commands in one folder: locks where the file system has none, one teacher for all, and no folders
left behind.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from support_data import QUICK, stand_in

from fastkd.io import files, locks
from fastkd.io.files import locked, owned
from fastkd.models import create_model
from fastkd.training import Settings, UserError, load_dataset, results
from fastkd.training.config import Config
from fastkd.training.teacher import find_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(
    params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, None],
    ids=lambda code: errno.errorcode.get(code, "no fcntl"),
)
def no_locks(request, monkeypatch):
    """A file system without flock, or a system."""
    if request.param is None:
        monkeypatch.setattr(files, "fcntl", None)
    else:
        pytest.importorskip("fcntl")

        def flock(file, operation):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_told", False)
    return request.param


def test_a_child_that_outlives_its_parent_holds_no_lock(tmp_path):
    """As a process that reads images does for a moment, when the run is killed."""
    pytest.importorskip("fcntl")
    (ours, theirs), (begun, begins) = os.pipe(), os.pipe()
    with owned(tmp_path / ".lock") as mine:
        child = os.fork()
        if child == 0:
            os.close(theirs)
            os.write(begins, b"1")
            os.read(ours, 1)  # until the parent lets it go
            os._exit(0)
        os.read(begun, 1)
    with owned(tmp_path / ".lock") as again:
        assert mine and again
    for end in (ours, theirs, begun, begins):
        os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_a_run_needs_no_file_locks(small_main, no_locks, tmp_path, capsys):
    assert small_main(["--method", "kd", *QUICK, "--epochs", "1", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if "file locks" in line]
    assert err == "" and [row["method"] for row in results.read_rows(tmp_path)[1]] == ["teacher", "kd"]
    assert not list(tmp_path.rglob("*.held"))
    if no_locks is None:
        assert lines == []
    else:
        (line,) = lines
        assert (
            f"has no file locks ({os.strerror(no_locks)}); a file .lock.held stands for .lock while it is"
            " held" in line
        )


def test_without_file_locks_one_holds_and_no_row_is_lost(no_locks, tmp_path):
    with owned(tmp_path / ".lock") as first, owned(tmp_path / ".lock") as second:
        assert first and not second
    with pytest.raises(KeyboardInterrupt), owned(tmp_path / ".lock"):
        raise KeyboardInterrupt
    with owned(tmp_path / ".lock") as again:
        assert again
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: results.append(tmp_path, {"seed": i, "folder": f"run{i}"}), range(12)))
    rows = results.read_rows(tmp_path)[1]
    assert [row["no"] for row in rows] == [str(i) for i in range(1, 13)] and {
        row["seed"] for row in rows
    } == {str(i) for i in range(12)}


# who holds it, how many seconds without a sign of life, whether it is left behind
@pytest.mark.parametrize(
    ("holder", "silent", "left"),
    [
        ("{dead} {here}", 0, True),
        ("{parent} {here}", 0, False),
        ("{me} {here}", 0, True),  # of a container before this one
        ("{dead} elsewhere", 0, False),
        ("{dead} elsewhere", 100, False),
        ("{dead} elsewhere", 200, True),
        ("", 0, False),  # killed between creation and writing, or just now at it
        ("", 200, True),
    ],
)
def test_a_mark_is_left_behind_when_its_process_is_gone(monkeypatch, tmp_path, holder, silent, left):
    monkeypatch.setattr(files, "fcntl", None)
    child = subprocess.Popen(["true"])
    child.wait()
    numbers = {"dead": child.pid, "parent": os.getppid(), "me": os.getpid(), "here": socket.gethostname()}
    mark = tmp_path / ".lock.held"
    mark.write_text(holder.format(**numbers))
    os.utime(mark, (time.time() - silent,) * 2)
    with owned(tmp_path / ".lock") as mine:
        assert mine == left
    assert mark.exists() != left and not list(tmp_path.glob("*.tmp"))


def test_who_holds_a_mark_renews_it(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(locks, "PULSE", 0.01)
    mark = tmp_path / ".lock.held"
    with owned(tmp_path / ".lock"):
        os.utime(mark, (0, 0))
        limit = time.monotonic() + 30
        while mark.stat().st_mtime < time.time() - 60 and time.monotonic() < limit:
            time.sleep(0.01)
        assert mark.stat().st_mtime > time.time() - 60
    assert not mark.exists()


def test_who_comes_second_waits_for_the_teacher(tmp_path, capsys):
    plan = Config(
        Settings(
            "kd", "digits", student="resnet8", teacher="resnet8", output=tmp_path, device="cpu", resume=""
        )
    )
    path, found = plan.teacher_path(), []
    with locked(tmp_path / f".{path.name}.lock"):
        thread = threading.Thread(target=lambda: found.append(find_teacher(plan)))
        thread.start()
        out, limit = "", time.monotonic() + 60
        while "waiting" not in out and time.monotonic() < limit:
            time.sleep(0.05)
            out += capsys.readouterr().out
        time.sleep(0.3)
        assert (
            not found
            and out + capsys.readouterr().out == f"teacher: another process trains {path}; waiting for it\n"
        )
        path.parent.mkdir()
        torch.save(
            {"model": create_model("resnet8").state_dict(), "config": {"identity": plan.identity("teacher")}},
            path,
        )
    thread.join(60)
    assert found and "training it first" not in capsys.readouterr().out


PAIR = """
import os, sys
from support_data import small_digits
small_digits()
import torch, train
torch.set_num_threads(1)
children = []
for student in ("resnet8", "resnet20"):
    child = os.fork()
    if child == 0:
        status = train.main([*sys.argv[1:], "--student", student])
        sys.stdout.flush()
        os._exit(status)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_two_commands_on_one_output_train_one_teacher(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    flags = ["--method", "at", *QUICK, "--epochs", "2", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", PAIR, *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(row["method"] for row in results.read_rows(tmp_path)[1]) == ["at", "at", "teacher"]
    assert done.stdout.count("training it first") == 1


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_no_folders(monkeypatch, tmp_path, there):
    root = tmp_path / "some" / "data"
    if there:
        root.mkdir(parents=True)

    def make(name, root):
        (root / name / "raw").mkdir(parents=True)
        raise URLError("no route to host")

    stand_in(monkeypatch, make)
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(UserError, match="download failed"):
            load_dataset(name, root)
        assert root.exists() == there and not list(root.glob("*")) and (tmp_path / "some").exists() == there


def test_a_failed_download_leaves_what_came(monkeypatch, tmp_path):
    def make(name, root):
        (root / name / "raw").mkdir(parents=True)
        (root / name / "raw" / "half").touch()
        raise KeyboardInterrupt

    stand_in(monkeypatch, make)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("fashion-mnist", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["FashionMNIST", "raw", "half"]


@pytest.mark.parametrize(
    "flags", [["--dataset", "cifar10"], [*QUICK, "--batch-size", "100"]], ids=["download", "batch"]
)
def test_a_command_that_cannot_begin_leaves_no_folders(small_main, monkeypatch, tmp_path, flags):
    stand_in(
        monkeypatch, lambda name, root: root.mkdir() or (_ for _ in ()).throw(URLError("no route to host"))
    )
    monkeypatch.chdir(tmp_path)
    assert small_main(["--method", "baseline", "--drop-last", *flags]) == 2
    assert not list(tmp_path.iterdir())
