"""The command: what it leaves, its exit statuses, one line for every mistake."""

from __future__ import annotations

import contextvars
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from record_files import rows_in, rows_of

from fastkd.models import create_model, load_weights

ROOT = Path(__file__).resolve().parents[2]
SMALL = """
import sys
from support_data import small_digits
from train import main
small_digits()
sys.exit(main(sys.argv[1:]))
"""
QUICK = ["--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8"]


def environment(**extra):
    path = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH")])
    )
    # one thread: on a busy machine two wait for each other at every operation, and these models are small
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **extra}


def command(*arguments, small=False):
    return [sys.executable, *(["-c", SMALL] if small else [str(ROOT / "train.py")]), *map(str, arguments)]


def start(*arguments, small=False, **extra):
    return subprocess.run(
        command(*arguments, small=small),
        capture_output=True,
        text=True,
        env=environment(**extra),
        timeout=300,
    )


@pytest.fixture
def main(small_main):
    return small_main


def test_a_whole_run_leaves_teacher_student_tables_and_checkpoints(main, capsys, tmp_path):
    """Without torchvision and Triton, from an empty folder; then again, with the teacher found."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torchvision", "triton"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')\n")
    paths = os.pathsep.join([str(blocked), environment()["PYTHONPATH"]])
    output = tmp_path / "runs"
    flags = ["--method", "at+kd", *QUICK, "--epochs", 1, "--output", output, "--data", tmp_path, "--seed", 3]
    first = start(*flags, small=True, PYTHONPATH=paths)
    assert (first.returncode, first.stderr) == (0, "")
    assert (
        "training it first" in first.stdout
        and "78,042 parameters" in first.stdout
        and "at+kd epoch 1/1" in first.stdout
    )
    changed = ["--lr", 0.01, "--precision", "bf16", "--teacher-checkpoint", *output.glob("teachers/*.pt")]
    assert main([*map(str, [*flags, *changed])]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "training it first" not in out

    rows = rows_of(output)
    assert [row["method"] for row in rows] == ["teacher", "at+kd", "at+kd"]
    for row in rows:
        assert (row["dataset"], row["student"], row["nepoch"], row["seed"], row["recipe"]) == (
            "digits",
            "resnet8",
            "1",
            "3",
            "digits",
        )
        assert float(row["acc"]) >= float(row["last_acc"]) >= 0 and float(row["images_per_second"]) > 0
    assert (
        rows[0]["teacher"] == ""
        and rows[1]["teacher"] == "resnet8"
        and rows[1]["teacher_acc"] == rows[0]["acc"]
    )
    assert (rows[2]["lr"], rows[2]["precision"], rows[2]["overrides"]) == ("0.01", "bf16", "epochs=1 lr=0.01")

    folder = output / rows[1]["folder"]
    best = load_weights(create_model("resnet8"), folder / "best.pt")
    assert f"{best['acc']:.2f}" == rows[1]["acc"] and best["epoch"] == int(rows[1]["epoch"])
    last = torch.load(folder / "last.pt", weights_only=True)
    assert {"model", "optimizer", "method", "epoch", "history", "config"} <= set(last) and last["epoch"] == 1
    assert len(last["optimizer"]["state"]) == sum(1 for _ in create_model("resnet8").parameters())
    epochs = rows_in(folder / "epochs.csv")
    assert [row["epoch"] for row in epochs] == ["1"]
    for row in epochs:
        assert float(row["loss"]) == pytest.approx(sum(float(row[term]) for term in ("ce", "at", "kd")))
    assert json.loads((folder / "config.json").read_text())["fields"]["epochs"] == 1
    assert not list(output.rglob("*.tmp"))


def test_ctrl_c_leaves_everything_whole_and_says_how_far_it_came(tmp_path):
    flags = ["--method", "baseline", *QUICK, "--epochs", 300, "--output", tmp_path]
    process = subprocess.Popen(
        command(*flags, small=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # a shell's background job, these tests' too, ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if "epoch 2/300" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(err.splitlines()) == 1 and "stopped in epoch" in err and "Traceback" not in out
    folder = next(tmp_path.glob("baseline-*"))
    last = torch.load(folder / "last.pt", weights_only=True)
    assert last["epoch"] >= 2 and f"weights of epoch {last['epoch']}" in err
    load_weights(create_model("resnet8"), folder / "best.pt")
    assert len((folder / "epochs.csv").read_text().splitlines()) == last["epoch"] + 1
    assert not (tmp_path / "results.csv").exists() and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "unknown"],
        ["--method", "fsp", "--epochs", "many"],
        ["--method", "at", "--student", "resnet21"],
        ["--methods", "at"],
        [],
    ],
    ids=" ".join,
)
def test_a_wrong_flag_is_one_line_and_status_2(main, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    out, err = capsys.readouterr()
    assert (
        caught.value.code == 2
        and out == ""
        and len(err.splitlines()) == 1
        and err.startswith("train.py: error: ")
    )


def test_the_status_reaches_the_shell(tmp_path):
    (tmp_path / "file").touch()
    for flags in (
        ["--method", "unknown"],
        ["--method", "fsp", "--dataset", "digits", "--output", tmp_path / "file" / "runs"],
    ):
        result = start(*flags)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "cifar10"], "cifar10: neither"),
        (["--dataset", "fashion-mnist"], "raw lacks train-images-idx3-ubyte, "),
        ([*QUICK, "--epochs", "0"], "--epochs is 0"),
        ([*QUICK, "--lr", "1e30"], "no longer finite"),
        ([*QUICK, "--batch-size", "2000"], "only 64 images"),
        ([*QUICK, "--device", "cuda"], "no such GPU"),
        ([*QUICK, "--preset", "nobody"], "nobody"),
        ("--dataset digits --student resnet8 --teacher wrn_16_2".split(), "does not fit wrn_16_2"),
        ([*QUICK, "--teacher-checkpoint", "{tmp}/none.pth"], "none.pth: No such file"),
        ([*QUICK, "--teacher-checkpoint", "{tmp}/other.pth"], "other.pth: another layout"),
        (
            [*QUICK, "--teacher-checkpoint", "{tmp}/classes.pth"],
            "classes.pth: trained for 100 classes, wanted 10",
        ),
        ([*QUICK, "--teacher-checkpoint", "{tmp}/text.pth"], "text.pth: not a checkpoint"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_what_the_user_can_mend_is_one_line_and_status_2(main, capsys, monkeypatch, tmp_path, flags, words):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    torch.save(create_model("wrn_16_1").state_dict(), tmp_path / "other.pth")
    torch.save(create_model("resnet8", 100).state_dict(), tmp_path / "classes.pth")
    (tmp_path / "text.pth").write_text("no weights")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["--method", "fsp", "--data", str(tmp_path), "--output", str(tmp_path / "runs"), *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("train.py: error: ") and words in err
    assert not (tmp_path / "runs" / "results.csv").exists() and not list(
        (tmp_path / "runs").glob("*/best.pt")
    )


@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_a_backend_that_cannot_serve_is_one_line_and_status_2(main, capsys, monkeypatch, tmp_path, name):
    monkeypatch.setattr("fastkd.native.EMULATED", None)  # by other tests of this process
    monkeypatch.setattr("fastkd._in_force._chosen", contextvars.ContextVar("fastkd_backend", default=name))
    assert main(["--method", "fsp", *QUICK, "--device", "cpu", "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and name in err


def test_a_foreign_table_stops_the_run_before_it_begins(main, capsys, tmp_path):
    (tmp_path / "results.csv").write_text("time,price\n")
    assert main(["--method", "baseline", *QUICK, "--output", str(tmp_path)]) == 2
    assert (
        "results.csv" in capsys.readouterr().err and (tmp_path / "results.csv").read_text() == "time,price\n"
    )


def test_every_field_of_a_recipe_has_its_flag(main, tmp_path, capsys):
    flags = (
        "--no-nesterov --momentum 0.5 --pad-mode reflect --teacher-mode train --drop-last-test --gamma 0.2"
        " --weight-decay 0 --epochs 1"
    )
    assert (
        main(["--method", "kd", *QUICK, "--output", str(tmp_path), "--batch-size", "32", *flags.split()]) == 0
    )
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    wanted = {
        "nesterov": False,
        "momentum": 0.5,
        "pad_mode": "reflect",
        "teacher_mode": "train",
        "drop_last_test": True,
        "gamma": 0.2,
    }
    assert {key: config["fields"][key] for key in wanted} == wanted and config["fields"]["weight_decay"] == 0
