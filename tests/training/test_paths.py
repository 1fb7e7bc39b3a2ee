"""Paths are taken as people write them: strings, and a ``~`` that no shell expands behind ``--data=``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import torch
from record_files import rows_of

from fastkd.models import create_model, load_weights
from fastkd.report import command as report
from fastkd.report import maps as redraw
from fastkd.training import Settings, UserError, choose_dataset, load_dataset

QUICK = "--dataset digits --teacher resnet8 --student resnet8 --batch-size 32 --device cpu --epochs 1".split()


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_string_is_a_path(small_main, home):
    from fastkd.training import repeat

    torch.save(create_model("resnet8").state_dict(), home / "teacher.pt")
    common = {
        "teacher": "resnet8",
        "student": "resnet8",
        "device": "cpu",
        "overrides": {"epochs": 1},
        "pictures": False,
    }
    repeat(
        Settings("kd", "digits", output="runs", data="data", teacher_checkpoint="~/teacher.pt", **common), 1
    )
    assert len(list(Path("runs").glob("kd-*/best.pt"))) == 1


def test_a_tilde_is_the_home_wherever_a_path_is_given(small_main, home, capsys):
    pytest.importorskip("matplotlib")
    flags = [*QUICK, "--output=~/runs", "--data=~/data", "--teacher-checkpoint=~/runs/teachers/given.pt"]
    (home / "runs" / "teachers").mkdir(parents=True)
    torch.save(create_model("resnet8").state_dict(), home / "runs" / "teachers" / "given.pt")
    assert small_main(["--method", "kd", *flags]) == 0
    (row,) = rows_of(home / "runs")
    folder = home / "runs" / row["folder"]
    script = (folder / "command.sh").read_text().splitlines()[-1]
    assert "~" not in script and str(home / "data") in shlex.split(script)
    assert small_main(["--method", "kd", *flags, f"--resume=~/runs/{row['folder']}"]) == 2
    assert "that run is finished" in capsys.readouterr().err
    (home / "table.md").write_text("<!-- experiments:begin -->\n<!-- experiments:end -->\n")
    assert report.main(["~/runs", "--plot=~/curves.png", "--into=~/table.md"]) == 0
    assert (home / "curves.png").exists() and "KD" in (home / "table.md").read_text()
    for sheet in folder.glob("*.png"):
        sheet.unlink()
    assert redraw.main([f"~/runs/{row['folder']}", "--data=~/data"]) == 0
    assert len(list(folder.glob("*.png"))) == 3
    load_weights(create_model("resnet8"), f"~/runs/{row['folder']}/best.pt")
    assert not list(Path.cwd().iterdir())  # no folder named ~


def test_auto_finds_the_set_under_the_home(home):
    folder = home / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        with open(folder / f"{name}.bin", "wb") as file:
            file.truncate(10_000 * 3073)
    for root in ("~/data", str(home / "data"), home / "data"):
        assert choose_dataset("auto", root)[0] == "cifar10"
    assert len(load_dataset("cifar10", "~/data").test_labels) == 10_000


@pytest.mark.parametrize("name", ["output", "data", "teacher_checkpoint", "resume"])
def test_what_is_no_path_is_one_line(name):
    with pytest.raises(UserError, match=f"^{name} is 3, wanted a path$"):
        Settings("at", **{name: 3})


def test_the_speed_report_takes_a_home_too(home):
    from report import path_of  # of benchmarks

    assert path_of("~/speed.json") == home / "speed.json"


def test_a_path_need_not_be_unicode(small_main, home, capsys):
    folder = Path(os.fsdecode(b"of \xe9mile"))
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("names are UTF-8 on this file system")
    torch.save(create_model("resnet8").state_dict(), folder / "teacher.pt")
    flags = [
        *QUICK,
        "--no-pictures",
        "--output",
        str(folder / "runs"),
        "--teacher-checkpoint",
        str(folder / "teacher.pt"),
    ]
    assert small_main(["--method", "kd", *flags]) == 0
    assert small_main(["--method", "kd", *flags]) == 0  # its table can be read
    script = next((folder / "runs").glob("kd-*/command.sh")).read_bytes()
    assert b"'of \xe9mile/runs'" in script
    assert small_main(["--method", "kd", *flags, "--epochs", "0"]) == 2
