"""What a run leaves beside its weights: log, curves, command, means over seeds; and that none of them can
lose its row.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from record_files import interrupt, rows_of
from support_data import QUICK

from fastkd.io import console
from fastkd.io.console import logged, say
from fastkd.models import create_model
from fastkd.training import Recipe, command, results
from fastkd.training.config import Config, Settings
from fastkd.training.own_flags import all_teachers


def test_screen_and_log_say_what_happens(small_main, tmp_path, capsys):
    assert small_main(["--method", "at+kd", *QUICK, "--epochs", "2", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    row = rows_of(tmp_path)[1]
    folder = tmp_path / row["folder"]
    start, end = out.split("at+kd: begins in")
    for words in (
        "at+kd: 2 epochs of ce + at + kd",
        "78,042 parameters",
        "digits (as asked), 64 training",
        "fp32, seed 0",
        "first epoch",
    ):
        assert words in start
    assert "losses   ce by plain PyTorch, at by " in start and "kd by plain PyTorch" in start
    assert "left" in end and f"row 2 of {tmp_path / 'results.csv'}" in end
    heads, values = (line.split("  ") for line in end.splitlines()[-4:-2])
    assert [word.strip() for word in heads if word] == list(results.COLUMNS[:11])
    assert [word.strip() for word in values if word] == [row[name] for name in results.COLUMNS[:11]]
    files, again = end.splitlines()[-2:]
    assert set(files.removeprefix("files").replace(",", " ").split()) == {
        path.name for path in folder.glob("[!.]*")
    }
    assert again.split(None, 1)[1] == json.loads((folder / "config.json").read_text())["command"]
    # the log is the screen, begun by the command; the teacher's has its own part
    log = (folder / "log.txt").read_text().splitlines()
    assert log[0].startswith("# 20") and "\n".join(log[1:]) + "\n" == out
    teacher = (tmp_path / rows_of(tmp_path)[0]["folder"] / "log.txt").read_text().splitlines()[1:]
    assert teacher[0].startswith("teacher: begins in") and set(teacher) < set(log) and len(teacher) == 5


def test_a_log_is_continued_and_keeps_what_a_run_ended_with(small_main, monkeypatch, tmp_path, capsys):
    flags = ["--method", "baseline", *QUICK, "--epochs", "3", "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 3)
    assert small_main(flags) == 130
    mended()
    assert small_main([*flags, "--resume"]) == 0
    text = next(tmp_path.glob("baseline-*/log.txt")).read_text()
    lines = [line for line in text.splitlines() if line.startswith("baseline epoch ")]
    assert [line.split("epoch ")[1].split("/")[0] for line in lines] == ["1", "2", "3"]
    assert (
        text.count("# 20") == 3
        and "ended: baseline stopped in epoch 3 of 3" in text
        and "goes on after epoch 2" in text
    )


def test_a_run_that_ends_before_its_first_checkpoint_leaves_no_folder(small_main, tmp_path, capsys):
    for method in ("baseline", "kd"):
        assert (
            small_main(
                ["--method", method, *QUICK, "--epochs", "1", "--output", str(tmp_path), "--lr", "1e30"]
            )
            == 2
        )
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_log_that_cannot_be_written_is_told_once_and_left(tmp_path, capsys):
    (tmp_path / "log.txt").mkdir()
    with logged(tmp_path):
        say("one")
        say("two")
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and "log.txt cannot be written: Is a directory" in lines[0]
        and lines[1:] == ["one", "two"]
    )
    assert console._logs == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "baseline", *QUICK],
        [
            "--method",
            "at",
            *QUICK,
            "--milestones",
            "0.25,0.5",
            "--no-nesterov",
            "--drop-last-test",
            "--lr",
            "0.02",
            "--epochs",
            "2",
        ],
        [
            "--method",
            "kd",
            *QUICK,
            "--recipe",
            "kdzoo",
            "--milestones",
            "",
            "--seed",
            "3",
            "--teacher-seed",
            "1",
            "--deterministic",
        ],
        [
            "--method",
            "fsp",
            *QUICK,
            "--precision",
            "bf16",
            "--teacher-checkpoint",
            "a file's name.pt",
            "--pad-mode",
            "reflect",
        ],
    ],
    ids=lambda flags: flags[1],
)
def test_the_command_says_all_that_was_asked_for(small_main, monkeypatch, tmp_path, flags):
    """What a shell makes of it gives the same plan."""
    import train

    monkeypatch.chdir(tmp_path)
    torch.save(create_model("resnet8").state_dict(), "a file's name.pt")

    def plan_of(arguments):
        given = vars(train.build_parser().parse_args(arguments))
        fields = {field.name: given.pop(field.name) for field in dataclasses.fields(Recipe)}
        assert given.pop("repeats") == 1
        given |= all_teachers(given.pop("teacher"), given.pop("teacher_checkpoint"))
        return Config(
            Settings(**given, overrides={name: value for name, value in fields.items() if value is not None})
        )

    plan = plan_of([*flags, "--output", str(tmp_path / "a folder; and $more"), "--data", "it's here"])
    words = subprocess.run(
        ["sh", "-c", f'python() {{ printf "%s\\0" "$@"; }}\n{command.command(plan)}'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    assert words[0].endswith("train.py")
    again = plan_of(words[1:])
    for role in ("student", "teacher")[: 1 + plan.method.needs_teacher]:
        assert again.identity(role) == plan.identity(role)
    for name in ("output", "data", "pictures", "precision", "deterministic", "overrides"):
        assert getattr(again.settings, name) == getattr(plan.settings, name)


def test_the_command_repeats_the_run(small_main, tmp_path):
    output = tmp_path / "one run's"
    assert (
        small_main(
            [
                "--method",
                "kd",
                *QUICK,
                "--epochs",
                "2",
                "--output",
                str(output),
                "--lr",
                "0.02",
                "--seed",
                "5",
            ]
        )
        == 0
    )
    row = rows_of(output)[1]
    script = (output / row["folder"] / "command.sh").read_text()
    assert f"cd {shlex.quote(str(Path.cwd()))} || exit\n" in script
    words = shlex.split(script.splitlines()[-1])
    assert words.pop() == "$@"  # for --resume
    assert small_main(words[words.index("train.py") + 1 :]) == 0
    again = rows_of(output)[2]
    weights = [
        torch.load(output / name / "best.pt", weights_only=True)["model"]
        for name in (row["folder"], again["folder"])
    ]
    assert row["folder"] != again["folder"] and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )
