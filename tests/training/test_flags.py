"""A flag does what it says or is refused with one line: nothing idle, nothing out of range, nothing guessed
from its first letters.
"""

from __future__ import annotations

import shutil
import sys

import pytest

import fastkd.__main__ as about
from fastkd.data import cifar
from fastkd.report import command as report
from fastkd.report import maps as redraw
from fastkd.training import Settings, choose_dataset, get_recipe
from fastkd.training.config import Config
from fastkd.training.flags import without_idle
from fastkd.training.run_summary import describe

QUICK = ["--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--device", "cpu"]


def refused(main, capsys, tmp_path, flags, words):
    """One line, status 2, before anything is left under --output."""
    output = tmp_path / "runs"
    assert main([*QUICK, "--output", str(output), *flags]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("train.py: error: ") and words in err
    assert out == "" and not list(output.glob("*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--method baseline --teacher-checkpoint x.pt",
            "--teacher-checkpoint does nothing here: --method baseline has no teacher",
        ),
        (
            "--method baseline --teacher-seed 0",
            "--teacher-seed does nothing here: --method baseline has no teacher",
        ),
        (
            "--method baseline --teacher-mode eval",
            "--teacher-mode does nothing here: --method baseline has no teacher",
        ),
        ("--method baseline --preset kdzoo", "--preset does nothing here: --method baseline has no teacher"),
        (
            "--method at --teacher-checkpoint x.pt --teacher-seed 1",
            "--teacher-seed does nothing here: --teacher-checkpoint needs no",
        ),
        ("--method at --init-epochs 3", "--init-epochs does nothing here: --method at has no first phase"),
        (
            "--method kd --recipe kdzoo --init-lr 0.1",
            "--init-lr does nothing here: --method kd has no first phase",
        ),
        (
            "--method at+kd --init-milestones 0.5",
            "--init-milestones does nothing here: --method at+kd has no first phase",
        ),
        ("--method fsp --init-lr 0.1", "--init-lr does nothing here: --init-epochs is 0"),
        (
            "--method fsp --recipe sakd --init-epochs 0 --init-milestones 0.5",
            "--init-milestones does nothing here: --init-epochs is 0",
        ),
        (
            "--method at --milestones= --gamma 0.2",
            "--gamma does nothing here: the learning rate has no milestones",
        ),
        (
            "--method at --milestones= --new-optimizer",
            "--new-optimizer does nothing here: the learning rate has no milestones",
        ),
        (
            "--method at --momentum 0 --no-nesterov --new-optimizer",
            "--new-optimizer does nothing here: --momentum is 0",
        ),
        (
            "--method at --normalization ofd",
            "--normalization does nothing here: ofd has no constants for digits",
        ),
        (
            "--method at --recipe sakd --setting a",
            "--setting does nothing here: teacher, student, data set and recipe are given",
        ),
        ("--method baseline --repeats 2 --teacher-seed 1", "--teacher-seed does nothing here"),
    ],
)
def test_a_flag_that_does_nothing_is_refused(small_main, capsys, tmp_path, flags, words):
    refused(small_main, capsys, tmp_path, flags.split(), words)


@pytest.mark.parametrize(
    "settings",
    [
        Settings("baseline", "digits", teacher="resnet110"),  # the pair whose baseline it is
        Settings("baseline", "cifar100", recipe="sakd", overrides={"normalization": "repdistiller"}),
        Settings("baseline", setting="a"),
        Settings(
            "at",
            "digits",
            teacher_seed=3,
            overrides={"preset": "kdzoo", "teacher_mode": "train", "gamma": 0.5},
        ),
        Settings("at", "digits", overrides={"momentum": 0.0, "nesterov": False, "normalization": "own"}),
        # the first phase's
        Settings("fsp", "digits", recipe="kdzoo", overrides={"init_lr": 0.1, "milestones": (), "gamma": 0.3}),
        Settings("fsp", "digits", overrides={"init_epochs": 2, "init_milestones": (0.5,), "init_lr": 0.1}),
    ],
    ids=lambda settings: f"{settings.method} {settings.overrides}",
)
def test_a_flag_that_does_something_is_not(settings):
    without_idle([settings])


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("momentum", "1.5", "at least 0 and less than 1"),
        ("momentum", "1", "at least 0 and less than 1"),
        ("momentum", "-0.1", "at least 0 and less than 1"),
        ("momentum", "nan", "at least 0 and less than 1"),
        ("gamma", "0", "more than 0 and at most 1"),
        ("gamma", "1.5", "more than 0 and at most 1"),
        ("gamma", "nan", "more than 0 and at most 1"),
        ("lr", "inf", "a positive number"),
        ("lr", "nan", "a positive number"),
        ("lr", "-1", "a positive number"),
        ("weight-decay", "-0.1", "a non-negative number"),
        ("weight-decay", "inf", "a non-negative number"),
        ("epochs", "-1", "at least 1"),
        ("batch-size", "1", "at least 2"),
        ("milestones", "0.5,1.0", "growing fractions"),
        ("milestones", "nan", "growing fractions"),
        ("repeats", "-3", "at least 1"),
    ],
)
def test_a_number_out_of_range_is_refused(small_main, capsys, tmp_path, flag, value, wanted):
    refused(small_main, capsys, tmp_path, ["--method", "at", f"--{flag}={value}"], f"wanted {wanted}")
    refused(small_main, capsys, tmp_path, ["--method", "at", f"--{flag}={value}"], f"--{flag} is ")


def test_numbers_at_the_ends_of_their_ranges_are_taken():
    ends = {
        "momentum": 0.0,
        "nesterov": False,
        "gamma": 1.0,
        "weight_decay": 0.0,
        "milestones": (),
        "epochs": 1,
        "batch_size": 2,
    }
    recipe = get_recipe("digits", ends)
    assert {name: getattr(recipe, name) for name in ends} == ends


@pytest.mark.parametrize(
    "flags", [["--l", "0.1"], ["--epoch", "3"], ["--teacher-check", "x.pt"], ["--no-pic"]], ids=" ".join
)
def test_an_abbreviated_flag_is_refused(small_main, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        small_main(["--method", "at", *QUICK, *flags])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and "unrecognized arguments: " + flags[0] in err


def test_no_other_command_takes_abbreviations_either(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["fastkd", "--js"])
    for command in (
        lambda: report.main([str(tmp_path), "--onl", "method=at"]),
        lambda: redraw.main([str(tmp_path), "--dat", "x"]),
        about.main,
    ):
        with pytest.raises(SystemExit) as caught:
            command()
        assert caught.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "cifar-10-batches-py"])
def test_auto_never_downloads_whatever_part_of_cifar10_is_there(
    small_main, monkeypatch, tmp_path, capsys, folder
):
    monkeypatch.setattr(cifar, "download", lambda *arguments: pytest.fail("downloads"))
    (tmp_path / "data" / folder).mkdir(parents=True)
    names = {"cifar-10-batches-bin": "data_batch_1.bin", "cifar-10-batches-py": "test_batch"}
    assert choose_dataset("auto", tmp_path / "data")[0] == "digits"  # the folder alone
    (tmp_path / "data" / folder / names[folder]).touch()
    name, why = choose_dataset("auto", tmp_path / "data")
    assert (
        name == "digits"
        and why.startswith(f"auto: no CIFAR-10 under {tmp_path / 'data'}: ")
        and f"{folder} lacks " in why
    )
    plan = Config(Settings("baseline", data=tmp_path / "data", student="resnet8", output=tmp_path / "runs"))
    assert plan.data.name == "digits" and why in describe(plan)
    shutil.rmtree(tmp_path / "data")
    assert choose_dataset("auto", tmp_path / "data")[0] == "digits"
