"""``--student-checkpoint``: a student that begins with given weights."""

from __future__ import annotations

import json

import torch
from record_files import rows_of

from fastkd.models import create_model

FLAGS = ["--dataset", "digits", "--student", "resnet8", "--device", "cpu", "--no-pictures", "--no-compile"]


def test_the_student_begins_with_the_weights_and_they_are_part_of_the_run(small_main, tmp_path, capsys):
    torch.manual_seed(1)
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    begun = create_model("resnet8")
    torch.save({"model": begun.state_dict()}, first)
    torch.save(create_model("resnet8").state_dict(), second)
    command = [
        "--method",
        "baseline",
        *FLAGS,
        "--epochs",
        "1",
        "--lr",
        "1e-30",
        "--output",
        str(tmp_path / "runs"),
    ]
    assert small_main([*command, "--student-checkpoint", str(first)]) == 0
    assert f"begun with {first}" in " ".join(capsys.readouterr().out.split())
    assert small_main(command) == 0
    one, other = rows_of(tmp_path / "runs")
    assert (one["student_checkpoint"], other["student_checkpoint"]) == (str(first), "")
    folder = tmp_path / "runs" / one["folder"]
    saved = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert all(torch.allclose(p, saved[name], 0, 1e-20) for name, p in begun.named_parameters())
    about = json.loads((folder / "config.json").read_text())
    assert (
        about["identity"]["student_weights"] and "--student-checkpoint" in (folder / "command.sh").read_text()
    )
    # the same weights in another file are the same run, other weights another
    for file, count in ((first.rename(tmp_path / "moved.pt"), 2), (second, 3)):
        assert small_main([*command, "--student-checkpoint", str(file), "--resume", "auto"]) == 0
        assert ("is finished" in capsys.readouterr().out) == (count == 2)
        assert len(rows_of(tmp_path / "runs")) == count


def test_weights_that_do_not_fit_are_one_line(small_main, tmp_path, capsys):
    torch.save(create_model("resnet20").state_dict(), tmp_path / "other.pt")
    command = ["--method", "baseline", *FLAGS, "--epochs", "1", "--output", str(tmp_path / "runs")]
    for file in ("other.pt", "none.pt"):
        assert small_main([*command, "--student-checkpoint", str(tmp_path / file)]) == 2
        told = capsys.readouterr().err
        assert file in told and told.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not [*(tmp_path / "runs").glob("baseline*")]
