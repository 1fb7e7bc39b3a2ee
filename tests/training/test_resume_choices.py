"""Which run --resume takes up, and what its command is."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest
import torch
from record_files import rows_of
from run_cases import error_of, settings_of
from support_data import QUICK

from fastkd.models import create_model, fingerprint
from fastkd.training import Trainer, UserError, repeat


def stop(monkeypatch, epoch):
    """Ctrl-C at the beginning of an epoch of this process; returns what puts an end to that."""
    whole, left = Trainer.train_epoch, [None] * epoch

    def train_epoch(self, number, progress):
        left.pop()
        if not left:
            raise KeyboardInterrupt
        whole(self, number, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    return lambda: monkeypatch.setattr(Trainer, "train_epoch", whole)


def test_a_compiled_run_is_taken_up_by_its_own_command(small_main, monkeypatch, tmp_path, capsys):
    """Compiled by the flag alone; nothing is really compiled here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    output = tmp_path / "runs"
    mended = stop(monkeypatch, 2)
    assert (
        small_main(["--method", "baseline", *QUICK, "--epochs", "2", "--compile", "--output", str(output)])
        == 130
    )
    mended()
    (folder,) = output.glob("baseline-*")
    words = shlex.split((folder / "command.sh").read_text().splitlines()[-1])[:-1]
    arguments = words[words.index("train.py") + 1 :]
    assert "--compile" in arguments and json.loads((folder / "config.json").read_text())[
        "command"
    ] == shlex.join(words)
    assert small_main([*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"baseline: {folder} goes on after epoch 1 of 2" in out and out.splitlines()[-1].split(None, 1)[
        1
    ] == shlex.join(words)
    (row,) = rows_of(output)
    environment = " ".join(word for word in words[: words.index("python")])
    assert [row[name] for name in ("deterministic", "compiled", "cuda_graph", "environment")] == [
        "no",
        "yes",
        "no",
        environment,
    ]


def test_resume_that_finds_nothing_names_the_nearest_run(small_main, monkeypatch, tmp_path, capsys):
    flags = ["--method", "baseline", *QUICK, "--epochs", "2", "--output", str(tmp_path)]
    assert error_of(small_main, capsys, [*flags, "--resume"]).endswith("; without --resume it begins\n")
    for more in ([], ["--lr", "0.3", "--seed", "7"]):
        mended = stop(monkeypatch, 2)
        assert small_main([*flags, *more]) == 130
        mended()
    (near,) = tmp_path.glob("baseline-*-seed0-*")
    err = error_of(small_main, capsys, [*flags, "--compile", "--resume"])
    assert err.endswith(
        f"under {tmp_path}; the nearest is {near.name}: compiled False instead of True; without --resume it"
        " begins\n"
    )
    err = error_of(small_main, capsys, [*flags, "--lr", "0.3", "--seed", "8", "--resume"])
    assert "-seed7-" in err and ": seed 7 instead of 8; " in err
    with pytest.raises(UserError, match=f"the nearest is {near.name}: lr 0.05 instead of 0.1;"):
        repeat(settings_of(tmp_path, "baseline", resume="", overrides={"epochs": 2, "lr": 0.1}), 2)
    assert small_main([*flags, "--resume"]) == 0
    assert error_of(small_main, capsys, [*flags, "--resume"]).endswith(f"; {near.name} is finished\n")


def test_a_run_goes_on_when_its_teacher_was_moved(small_main, monkeypatch, tmp_path, capsys):
    """The file that was named, the one that was trained, and never one with other weights."""
    torch.manual_seed(1)
    here, there, other = (tmp_path / name for name in ("here.pt", "there.pt", "other.pt"))
    for path in (here, other):
        torch.save(create_model("resnet8").state_dict(), path)
    flags = ["--method", "kd", *QUICK, "--epochs", "2", "--output", str(tmp_path / "runs")]

    mended = stop(monkeypatch, 2)
    assert small_main([*flags, "--teacher-checkpoint", str(here)]) == 130
    mended()
    here.rename(there)
    weights = [fingerprint(model) for model in loaded(there, other)]
    err = error_of(small_main, capsys, [*flags, "--teacher-checkpoint", str(other), "--resume"])
    assert f": teacher_weights {weights[0]} instead of {weights[1]}; " in err
    assert small_main([*flags, "--teacher-checkpoint", str(there), "--resume"]) == 0
    assert "kd: " in (out := capsys.readouterr().out) and "goes on after epoch 1 of 2" in out

    mended = stop(monkeypatch, 2 + 2)  # its own teacher is trained first
    assert small_main(flags) == 130
    mended()
    (kept,) = (tmp_path / "runs" / "teachers").glob("*.pt")
    kept.rename(here)
    assert "no unfinished run" in error_of(
        small_main, capsys, [*flags, "--teacher-checkpoint", str(other), "--resume"]
    )
    assert small_main([*flags, "--teacher-checkpoint", str(here), "--resume"]) == 0
    assert "goes on after epoch 1 of 2" in capsys.readouterr().out
    assert [row["method"] for row in rows_of(tmp_path / "runs")] == ["kd", "teacher", "kd"]


def loaded(*paths):
    for path in paths:
        model = create_model("resnet8")
        model.load_state_dict(torch.load(path, weights_only=True))
        yield model


def test_resume_auto_begins_goes_on_and_ends(small_main, monkeypatch, tmp_path, capsys):
    """One command for a queue that starts a job until its status is 0."""
    flags = ["--method", "kd", *QUICK, "--epochs", "2", "--output", str(tmp_path), "--resume", "auto"]
    for epochs, words in ((2, "teacher: begins in"), (2, "going on with its training"), (2, "kd: begins in")):
        mended = stop(monkeypatch, epochs)
        assert small_main(flags) == 130
        mended()
        assert words in capsys.readouterr().out
    (folder,) = tmp_path.glob("kd-*")
    for other in ("kd-a", "kd-z"):  # of several the one that came furthest
        (tmp_path / other).mkdir()
        shutil.copy(folder / "config.json", tmp_path / other)
    assert small_main(flags) == 0
    assert f"kd: {folder} goes on after epoch 1 of 2" in capsys.readouterr().out
    for other in ("kd-a", "kd-z"):
        shutil.rmtree(tmp_path / other)
    assert small_main(flags) == 0
    row = rows_of(tmp_path)[1]
    told = f"kd: {row['folder']} is finished, row 2 of {tmp_path / 'results.csv'}, {row['reported_acc']} %\n"
    assert capsys.readouterr().out == told and [row["method"] for row in rows_of(tmp_path)] == [
        "teacher",
        "kd",
    ]


def test_resume_auto_serves_repeats_too(small_main, monkeypatch, tmp_path, capsys):
    flags = [
        "--method",
        "baseline",
        *QUICK,
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
        "--resume",
        "auto",
        "--repeats",
        "2",
    ]
    mended = stop(monkeypatch, 2)
    assert small_main(flags) == 130
    mended()
    for _ in range(2):
        assert small_main(flags) == 0
        assert "2 runs, seeds 0 1: acc " in capsys.readouterr().out
    assert [row["seed"] for row in rows_of(tmp_path)] == ["0", "1"]
