"""``fastkd-train``, the command that an installation has, is ``python train.py`` in all but its name."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_cases import error_of
from support_data import QUICK

from fastkd.training.settings import VARIABLES

ROOT = Path(__file__).resolve().parents[2]


def test_the_installed_command_is_the_main_of_train_py(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastkd.training import cli

    assert runpy.run_path(str(ROOT / "train.py"))["main"] is cli.main
    assert 'fastkd-train = "fastkd.training.cli:main"' in (ROOT / "pyproject.toml").read_text(
        encoding="utf-8"
    )
    for called, name in (("/somewhere/bin/fastkd-train", "fastkd-train"), ("train.py", "train.py")):
        monkeypatch.setattr(sys, "argv", [called, "--method", "none"])
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().err.startswith(f"{name}: error: argument --method: method 'none' is")


def test_a_run_of_the_installed_command_is_repeated_by_it(
    small_main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = "--method baseline --student resnet8 --dataset digits --epochs 1 --no-pictures --output".split()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fastkd-train", *flags, str(tmp_path)])
    for name in VARIABLES:  # of whoever runs the tests: the command would repeat them
        monkeypatch.delenv(name, raising=False)
    assert small_main([*flags, str(tmp_path)]) == 0
    (command,) = tmp_path.glob("*/command.sh")
    assert command.read_text().splitlines()[-1].startswith("fastkd-train --method baseline ")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--method", "at+none"], "argument --method: method 'at+none' is not known; known: baseline, kd, "),
        (["--method", "at", "--epochs", "x"], "argument --epochs: 'x', wanted a whole number (see "),
        (["--method", "at", "--seed", "-1"], "argument --seed: '-1', wanted a whole number from 0 on (see "),
        (["--method", "at", "--seed", "1.5"], "argument --seed: '1.5', wanted a whole number (see "),
        (["--method", "at", "--lr", "fast"], "argument --lr: 'fast', wanted a number (see "),
        (["--method", "at", "--workers", "all"], "argument --workers: 'all', wanted a whole number (see "),
        (["--methd", "at"], "the following arguments are required: --method (see "),
    ],
)
def test_what_no_flag_takes_is_one_line(flags, told, capsys):
    from fastkd.training import cli

    with pytest.raises(SystemExit) as ended:
        cli.build_parser().parse_args(flags)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and f": error: {told}" in err


def test_a_trial_of_a_run_that_is_to_go_on_is_refused(small_main, tmp_path, capsys):
    flags = ["--method", "baseline", *QUICK, "--output", str(tmp_path), "--dry-run", "--resume", "folder"]
    told = error_of(small_main, capsys, flags)
    assert "--resume folder: --dry-run plans a run from its beginning; leave one out" in told
    assert not list(tmp_path.iterdir())
