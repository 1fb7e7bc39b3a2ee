"""Curves for TensorBoard: the history, once, and no run that depends on them."""

from __future__ import annotations

import errno
import resource
import threading

import pytest
from record_files import interrupt, rows_in, rows_of
from support_data import QUICK

from fastkd.training import tensorboard
from fastkd.training.tensorboard import Curves

TWO_PHASES = ["--method", "fsp", "--recipe", "sakd", *QUICK, "--epochs", "3", "--init-epochs", "2"]


def epochs_of(path):
    return [{key: float(value) for key, value in row.items()} for row in rows_in(path)]


def points(folder):
    """{tag: [(step, value), ...]} of all event files in the order of the files."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found: dict[str, list] = {}
    for path in sorted(folder.glob(tensorboard.EVENTS)):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def test_curves_are_the_history_and_a_resumed_run_has_no_step_twice(small_main, monkeypatch, tmp_path):
    """Stopped in each phase, and taken up by an object that knows of no phase before."""
    flags = [*TWO_PHASES, "--output", str(tmp_path)]
    # in the second epoch of the first phase, at the second's beginning, in its second epoch
    for after in (3 + 2, 2 + 1, 2):
        mended = interrupt(monkeypatch, after)
        assert small_main([*flags, *["--resume"] * (after != 5)]) == 130
        mended()
    assert small_main([*flags, "--resume"]) == 0
    folder = next(tmp_path.glob("fsp-*"))
    found = points(folder)
    assert len(list(folder.glob(tensorboard.EVENTS))) == 1
    expected = {}
    for prefix, name in (("", "epochs.csv"), ("init/", "init.csv")):
        for epoch in epochs_of(folder / name):
            for tag, key in {
                "loss/total": "loss",
                "lr": "lr",
                "accuracy/train": "train_acc",
                "images_per_second": "images_per_second",
            }.items():
                expected.setdefault(prefix + tag, []).append(
                    (int(epoch["epoch"]), pytest.approx(epoch[key], rel=1e-6))
                )
            for term in ("ce", "fsp"):
                if term in epoch:
                    expected.setdefault(f"{prefix}loss/{term}", []).append(
                        (int(epoch["epoch"]), pytest.approx(epoch[term], rel=1e-6))
                    )
            if "test_acc" in epoch:
                expected.setdefault("accuracy/test", []).append(
                    (int(epoch["epoch"]), pytest.approx(epoch["test_acc"], rel=1e-6))
                )
    assert [step for step, _ in found["lr"]] == [1, 2, 3] and [
        step for step, _ in found["init/loss/fsp"]
    ] == [1, 2]
    assert found == expected


def test_without_tensorboard_the_screen_says_so_and_the_run_is_whole(
    small_main, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "1", "--output", str(tmp_path)]) == 0
    assert "no TensorBoard curves (the package tensorboard is not installed)" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 1 and not list(tmp_path.rglob(tensorboard.EVENTS))


def test_curves_that_fail_lose_no_row(small_main, monkeypatch, tmp_path, capsys):
    writer = pytest.importorskip("torch.utils.tensorboard")

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.SummaryWriter, "flush", full)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "2", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("No space left on device") == 1 and "the run goes on" in out and err == ""
    assert rows_of(tmp_path)[0]["nepoch"] == "2"


def test_curves_on_a_full_disk_are_one_line(tmp_path, capfd, monkeypatch):
    pytest.importorskip("tensorboard")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made, history, tracebacks = Curves(tmp_path), [], []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for epoch in range(1, 30):
            history.append(
                {"epoch": epoch, "lr": 0.1, "loss": 1.0, "ce": 1.0, "train_acc": 50.0, "test_acc": 50.0}
            )
            made.add("main", history)
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and "File too large" in out and err == ""
    assert not tracebacks and threading.excepthook == tracebacks.append


def history(epochs, **terms):
    return [
        {"epoch": i, "lr": 0.1, "loss": 1.0, **terms, "train_acc": 50.0, "test_acc": 50.0 + i}
        for i in range(1, epochs + 1)
    ]


def writers():
    return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("tensorboard.")]


def test_a_csv_of_the_users_own_is_not_read_and_curves_go_on(small_main, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    flags = [*TWO_PHASES, "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 3 + 2 + 2)
    assert small_main(flags) == 130
    mended()
    folder = next(tmp_path.glob("fsp-*"))
    (folder / "notes.csv").write_text("day,remark\nMonday,it rains\n")
    assert small_main([*flags, "--resume"]) == 0
    assert "curves" not in capsys.readouterr().out.split("goes on after")[1]
    found = points(folder)
    assert [step for step, _ in found["lr"]] == [1, 2, 3] and [
        step for step, _ in found["init/loss/fsp"]
    ] == [1, 2]
    assert not [tag for tag in found if "notes" in tag]


@pytest.mark.parametrize("what", ["flush", "__init__", "add_scalar", "init.csv"])
def test_curves_are_deleted_only_once_others_are_written_and_leave_no_thread(
    monkeypatch, tmp_path, capsys, what
):
    writer = pytest.importorskip("torch.utils.tensorboard")
    before = writers()
    first = Curves(tmp_path)
    first.add("main", history(2))
    first.close()
    (old,) = tmp_path.glob(tensorboard.EVENTS)
    content = old.read_bytes()

    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    second = Curves(tmp_path)
    second.earlier = ["init"] if what == "init.csv" else []
    with monkeypatch.context() as patch:
        if what == "__init__":  # when the thread is there already
            patch.setattr("tensorboard.summary.writer.event_file_writer._AsyncWriter.flush", full)
        elif what != "init.csv":
            patch.setattr(writer.SummaryWriter, what, full)
        second.add("main", history(3))
        second.add("main", history(4))
        second.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "end here" in lines[0] and "the run goes on" in lines[0]
    assert old.read_bytes() == content and writers() == before
    third = Curves(tmp_path)
    third.add("main", history(4))
    third.close()
    assert (
        not old.exists()
        and points(tmp_path)["accuracy/test"] == [(i, 50.0 + i) for i in range(1, 5)]
        and writers() == before
    )
