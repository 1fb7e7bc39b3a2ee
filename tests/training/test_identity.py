"""What makes two runs the same: the teacher they take, the command that repeats them, and what --resume takes
up.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess

import pytest
import torch
from record_files import rows_of
from run_cases import error_of, settings_of
from support_data import QUICK

from fastkd.models import create_model
from fastkd.report.maps import redraw
from fastkd.training.command import command, command_file
from fastkd.training.config import Config


def test_a_teacher_has_a_file_for_each_identity(small_main, monkeypatch, tmp_path):
    """Whatever its identity holds, two that differ in it lie apart, and those of one identity together."""
    monkeypatch.setattr("fastkd.training.config.find_device", lambda name: torch.device(name))
    # nothing can run on the device that is named
    monkeypatch.setattr(Config, "_check_fit", lambda self: None)
    changes = [
        {}, {"precision": "bf16"}, {"device": "cuda"}, {"device": "cuda", "cuda_graph": False},
        {"deterministic": True}, {"compile": True}, {"seed": 1}, {"teacher": "resnet20"}, {"recipe": "sakd"},
        {"overrides": {"lr": 0.2}}, {"overrides": {"epochs": 2}},
    ]  # fmt: skip
    plans = [Config(settings_of(tmp_path, **change)) for change in changes]
    identities = [plan.identity("teacher") for plan in plans]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])
    assert len({plan.teacher_path().name for plan in plans}) == len(plans)
    assert plans[0].teacher_path().name == "digits-resnet8-digits-1epochs-seed0.pt"
    # what the recipe has anyway
    said = Config(settings_of(tmp_path, overrides={"lr": 0.05, "momentum": 0.9}))
    assert said.identity("teacher") == identities[0] and said.teacher_path() == plans[0].teacher_path()


def test_a_run_says_which_teacher_it_took_and_takes_no_other(small_main, tmp_path, capsys):
    """A teacher trained in bf16, under the name that fp32's has."""
    flags = ["--method", "kd", *QUICK, "--epochs", "1", "--output", str(tmp_path)]
    assert small_main([*flags, "--precision", "bf16"]) == 0
    bf16 = Config(settings_of(tmp_path, precision="bf16")).teacher_path()
    assert (
        f"teacher: resnet8 from {bf16} (trained on digits by digits, 1 epoch, seed 0, bf16, cpu), "
        in capsys.readouterr().out
    )
    fp32 = Config(settings_of(tmp_path)).teacher_path()
    shutil.copy(bf16, fp32)
    before = fp32.read_bytes()
    err = error_of(small_main, capsys, flags)
    assert (
        f"{fp32} is another teacher: precision bf16 instead of fp32; move it away, or name it by"
        " --teacher-checkpoint" in err
    )
    assert fp32.read_bytes() == before and len(rows_of(tmp_path)) == 2
    torch.save(create_model("resnet8").state_dict(), fp32)  # says nothing of its training
    assert "is another teacher: " in error_of(small_main, capsys, flags)
    fp32.unlink()
    assert small_main(flags) == 0
    assert f"{fp32} is not there yet; training it first" in capsys.readouterr().out
    assert small_main([*flags, "--teacher-checkpoint", str(bf16)]) == 0  # by name, whatever it is


def test_pictures_are_redrawn_with_the_teacher_of_the_run(small_main, monkeypatch, tmp_path):
    """On a machine with another device, whose own teachers have other names."""
    pytest.importorskip("matplotlib")
    flags = [
        "--method",
        "kd",
        *QUICK,
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
        "--precision",
        "bf16",
        "--deterministic",
    ]
    assert small_main(flags) == 0
    assert len(redraw(next(tmp_path.glob("kd-*")), None)) == 3


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"compile": True},
        {"deterministic": True},
        {"device": "cuda"},
        {"device": "cuda", "cuda_graph": False},
    ],
)
def test_the_command_has_every_choice_that_changes_bits(small_main, monkeypatch, tmp_path, change):
    """Also where another machine, or another day, would choose otherwise by itself."""
    import train

    monkeypatch.setattr("fastkd.training.config.find_device", lambda name: torch.device(name))
    # nothing can run on the device that is named
    monkeypatch.setattr(Config, "_check_fit", lambda self: None)
    plan = Config(settings_of(tmp_path, "at", **change))
    words = shlex.split(command(plan))
    given = train.build_parser().parse_args(words[words.index("train.py") + 1 :])
    assert (given.compile, given.cuda_graph) == (
        plan.compiled,
        plan.captured if plan.device.type == "cuda" else None,
    )
    monkeypatch.setattr("fastkd.training.config.WORTH_COMPILING", 0)
    monkeypatch.setattr("fastkd.training.config.can_compile", lambda device: True)
    again = Config(
        settings_of(tmp_path, "at", **{**change, "compile": given.compile, "cuda_graph": given.cuda_graph})
    )
    assert again.identity("student") == plan.identity("student")


def test_a_run_of_several_has_a_command_that_is_not_refused(small_main, tmp_path, capsys):
    """Its seeds share a teacher: one that is trained has a seed, one that is given has none."""
    torch.save(create_model("resnet8").state_dict(), tmp_path / "t.pt")
    flags = [*QUICK, "--epochs", "1", "--output", str(tmp_path), "--seed", "3", "--repeats", "2"]
    for more, teacher_seeds in (
        (["--teacher-checkpoint", str(tmp_path / "t.pt")], [False, False]),
        ([], [False, True]),
    ):
        assert small_main(["--method", "kd", *flags, *more]) == 0
        rows = rows_of(tmp_path)[-2:]
        for row, wanted in zip(rows, teacher_seeds, strict=True):
            words = shlex.split(json.loads((tmp_path / row["folder"] / "config.json").read_text())["command"])
            assert ("--teacher-seed" in words) == wanted
        assert small_main(words[words.index("train.py") + 1 :]) == 0
        again = rows_of(tmp_path)[-1]
        assert all(again[name] == rows[1][name] for name in ("acc", "losses", "teacher_acc", "seed"))


def test_the_command_has_the_environment_that_changes_bits(small_main, monkeypatch, tmp_path):
    for name in ("FASTKD_CPU", "FASTKD_AMX", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    monkeypatch.chdir(tmp_path)
    plan = Config(settings_of(tmp_path, "at"))
    assert command(plan).startswith("FASTKD_BACKEND=reference python train.py --method at ")
    # a shell gives the variable to the program, and the program the flags that the script is given
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$FASTKD_BACKEND" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "command.sh").write_text(command_file(plan, "student"))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FASTKD_BACKEND": "cpp"}
    done = subprocess.run(
        ["sh", "command.sh", "--resume"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["reference", *shlex.split(command(plan))[2:], "--resume"]
