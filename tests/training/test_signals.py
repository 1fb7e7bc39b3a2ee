"""Ctrl-C and SIGTERM: what was saved is what is said, the same line and a status for each, of several
processes too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support_data import QUICK

from fastkd.training import results

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    ),
}


@pytest.mark.parametrize(
    ("name", "epoch", "when", "words"),
    [
        (
            "last.pt",
            1,
            "before",
            "in epoch 1 of 3, while it was saved; no epoch was saved; no row was added; --resume goes on",
        ),
        ("last.pt", 2, "before", "in epoch 2 of 3, while it was saved; the weights of epoch 1 {are}; no row"),
        ("last.pt", 2, "after", "in epoch 3 of 3, step 0 of 2; the weights of epoch 2 {are}; no row"),
        ("epochs.csv", 2, "before", "in epoch 3 of 3, step 0 of 2; the weights of epoch 2 {are}; no row"),
        ("last.pt", 3, "after", "after its last epoch; the weights of epoch 3 {are}; no row was added"),
        ("results.csv", 3, "before", "after its last epoch; the weights of epoch 3 {are}; no row was added"),
        ("results.csv", 3, "after", "after its last epoch; the weights of epoch 3 {are}; its row was added"),
    ],
)
def test_ctrl_c_within_a_save_names_the_epoch_that_was_saved(
    small_main, monkeypatch, tmp_path, capsys, name, epoch, when, words
):
    write, left = results.write, {"last.pt": epoch, "epochs.csv": epoch, "results.csv": 1}[name]

    def interrupted(path, content):
        nonlocal left
        left -= path.name == name
        if left == 0 and when == "before":
            left = -1
            raise KeyboardInterrupt
        write(path, content)
        if left == 0:
            left = -1
            raise KeyboardInterrupt

    for module in ("training.run_dir", "training.results", "io.files"):
        monkeypatch.setattr(sys.modules[f"fastkd.{module}"], "write", interrupted)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "3", "--output", str(tmp_path)]) == 130
    monkeypatch.undo()
    (line,) = capsys.readouterr().err.splitlines()
    folder = next(tmp_path.glob("baseline-*"))
    best = f"{torch.load(folder / 'best.pt')['acc']:.2f}" if (folder / "best.pt").exists() else ""
    are = f"and the best ({best} %) are in {folder}"
    assert line.startswith("train.py: baseline stopped " + words.format(are=are))
    saved = epoch - (name == "last.pt" and when == "before")
    assert (folder / "last.pt").exists() == (saved > 0) and (
        not saved or torch.load(folder / "last.pt")["epoch"] == saved
    )
    assert len(results.read_rows(tmp_path)[1]) == ("its row was added" in line)


def lines_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without {words!r}: {process.stderr.read()}")


def test_sigterm_ends_a_run_like_ctrl_c(tmp_path):
    flags = ["--method", "baseline", *QUICK, "--epochs", "300", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    lines_until(process, "epoch 2/300")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # a queue sends it to the process and to its group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    folder = next(tmp_path.glob("baseline-*"))
    epoch = torch.load(folder / "last.pt")["epoch"]
    (line,) = err.splitlines()
    assert (
        line.startswith("train.py: baseline stopped in epoch")
        and f"the weights of epoch {epoch} and the best" in line
    )
    assert line.endswith("no row was added; --resume goes on") and "Traceback" not in out
    assert f" ended: {line.removeprefix('train.py: ')}" in (folder / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_sigterm_ends_several_processes_with_one_line(tmp_path):
    """Sent to torchrun, which sends it to all of them at once."""
    flags = [
        "--method",
        "baseline",
        *QUICK[:6],
        "--batch-size",
        "16",
        "--device",
        "cpu",
        "--epochs",
        "3000",
        "--output",
        str(tmp_path),
    ]
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "tests" / "helpers" / "distributed_worker.py"),
    ]
    process = subprocess.Popen(
        [sys.executable, *launch, "command", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    lines_until(process, "epoch 2/3000")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (line,) = [line for line in err.splitlines() if "train.py: " in line]
    epoch = torch.load(next(tmp_path.glob("baseline-*/last.pt")))["epoch"]
    assert (
        line.startswith("train.py: baseline stopped in epoch")
        and f"the weights of epoch {epoch} and the best" in line
    )
    assert "fastkd/training" not in err  # no traceback of ours; torchrun adds its own report
