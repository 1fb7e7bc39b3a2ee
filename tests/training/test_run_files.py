"""Files of a run: written whole, numbered, never overwritten; and what a terminal sees."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from record_files import rows_of

from fastkd.io import files as files_module
from fastkd.io.files import make_folder, save, write
from fastkd.training import UserError
from fastkd.training.progress import Progress, clock
from fastkd.training.results import COLUMNS, append, read_rows


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save(path, {"epoch": 1, "weights": torch.ones(3)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last.pt cannot be written: No space left"):
        save(path, {"epoch": 2})

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "half")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        make_folder(tmp_path / "file" / "runs")


def test_rows_are_numbered_appended_and_kept_whole(tmp_path):
    for i in range(3):
        assert (
            append(tmp_path, {"method": "at", "acc": "91.80", "seed": 0, "lr": 0.1, "recipe": "a|b"})["no"]
            == i + 1
        )
    rows = rows_of(tmp_path)
    assert (
        [row["no"] for row in rows] == ["1", "2", "3"]
        and rows[2]["acc"] == "91.80"
        and rows[2]["seed"] == "0"
    )
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert header.startswith(
        "no,method,dataset,student,teacher,start_time,acc,epoch,nepoch,lr,batch_size,"
        "last_acc,seed,recipe,precision,device,seconds,images_per_second,fastkd,"
    )
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert (
        len(lines) == 5
        and len({line.replace("\\|", "").count("|") for line in lines}) == 1
        and "a\\|b" in lines[-1]
    )


def test_results_md_fits_120_columns(tmp_path):
    long = {
        "method": "at+kd",
        "student": "torchvision:resnet18",
        "teacher": "torchvision:resnet34",
        "lr": 0.1,
    }
    for changed in ("epochs=2", "epochs=2 batch_size=8 image_size=64 at.beta=500.0"):
        append(tmp_path, {**long, "dataset": "folder:imagenette", "acc": "91.80", "overrides": changed})
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert {len(line) for line in lines} == {max(map(len, lines))} and len(lines[0]) <= 120
    # the ends of names tell them apart, and the list of changes is shortened first
    assert "resnet34 |" in lines[-1] and "epochs=2 " in lines[-2] and "…" in lines[-1].split("|")[-2]
    assert "at.beta=500.0" in (tmp_path / "results.csv").read_text()


def test_columns_of_another_version_are_kept(tmp_path):
    (tmp_path / "results.csv").write_text(",".join([*COLUMNS[:12], "curious"]) + "\n1" + "," * 11 + ",yes\n")
    append(tmp_path, {"method": "kd", "seed": 7})
    columns, rows = read_rows(tmp_path)
    assert columns == [*COLUMNS, "curious"]
    assert [row["curious"] for row in rows] == ["yes", ""] and rows[1]["seed"] == "7"


def test_a_table_of_something_else_is_not_overwritten(tmp_path):
    for content in (b"time,price\n1,2\n", b"\xff\xfe\x00"):
        (tmp_path / "results.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"results.csv"):
            append(tmp_path, {"method": "kd"})
        assert (tmp_path / "results.csv").read_bytes() == content


def test_two_writers_lose_no_row(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    if files_module.fcntl is None:
        pytest.skip("no file locks on this system")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append(tmp_path, {"seed": i}), range(24)))
    rows = read_rows(tmp_path)[1]
    assert [row["no"] for row in rows] == [str(i) for i in range(1, 25)] and {
        row["seed"] for row in rows
    } == {str(i) for i in range(24)}


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_sees_progress_and_a_file_sees_none(monkeypatch, capsys, bar):
    import sys

    if bar:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        progress = Progress("fsp", 10)
        progress.shown -= 60
        progress.advance(lambda: "loss 1.234 acc 50.0 % 99 images/s")
        progress.line("epoch 1/1")
        progress.close()
        out, err = capsys.readouterr()
        assert out == "epoch 1/1\n"
        assert ("loss 1.234 acc 50.0 % 99 images/s" in err and "1" in err) if terminal else err == ""


def test_clock():
    assert [clock(s) for s in (0.4, 70, 3700)] == ["0:00", "1:10", "1:01:40"]


def test_a_log_gets_lines_within_a_long_epoch(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    bar = Progress("at", 4)
    bar.advance(lambda: "loss 1.0")
    assert capsys.readouterr().out == ""  # two minutes have not passed
    monkeypatch.setattr("fastkd.training.progress.LOGGED", 0)
    bar.advance(lambda: "loss 0.5")
    out, err = capsys.readouterr()
    assert out.startswith("at: step 2 of 4, loss 0.5, 0:0") and out.endswith(" left\n")
    assert "\r" not in out and err == ""
