"""``--option`` from the command line to the method, and to all that a run leaves."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import toy_methods
from record_files import rows_of

from fastkd import methods
from fastkd.training import RECIPES, UserError
from fastkd.training.config import Config, Settings
from fastkd.training.groups import changes
from fastkd.training.recipes import get_recipe

QUICK = "--dataset digits --teacher resnet8 --student resnet8 --epochs 1 --no-pictures --device cpu".split()


def settings(method, tmp_path, *options, **more):
    return Settings(
        method, "digits", teacher="resnet8", student="resnet8", output=tmp_path, options=options, **more
    )


def test_an_option_reaches_the_method_and_all_that_a_run_leaves(small_main, tmp_path, capsys):
    flags = [
        "--output",
        str(tmp_path),
        "--method",
        "kd+at",
        *QUICK,
        "--option",
        "beta=500",
        "--option",
        "at.weights=0.5:1:2",
    ]
    assert small_main(flags) == 0
    out = capsys.readouterr().out
    assert "at.beta=500.0; at.weights=0.5:1.0:2.0" in out
    (folder,) = tmp_path.glob("at+kd-*")
    config = json.loads((folder / "config.json").read_text())
    assert config["options"] == ["beta=500", "at.weights=0.5:1:2"]
    assert config["identity"]["options"] == {"at.beta": "500.0", "at.weights": "0.5:1.0:2.0"}
    row = rows_of(tmp_path)[-1]
    assert row["method"] == "at+kd" and row["overrides"].endswith("at.beta=500.0 at.weights=0.5:1.0:2.0")
    assert (
        changes(row) == ["at.beta=500.0", "at.weights=0.5:1.0:2.0"]
        and "at." not in rows_of(tmp_path)[0]["overrides"]
    )
    command = (folder / "command.sh").read_text().splitlines()[-1].removesuffix('"$@"')
    words = shlex.split(command)
    assert [words[i + 1] for i, word in enumerate(words) if word == "--option"] == [
        "at.beta=500.0",
        "at.weights=0.5:1.0:2.0",
    ]
    weights = torch.load(folder / "last.pt", weights_only=True)["model"]
    assert small_main(words[words.index("--method") :]) == 0  # the command repeats the run
    (again,) = (path for path in tmp_path.glob("at+kd-*") if path != folder)
    found = torch.load(again / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert small_main([*flags, "--resume", "auto"]) == 0 and "is finished" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 3


@pytest.fixture
def toys(monkeypatch, small_main):
    monkeypatch.setattr(methods, "_KINDS", toy_methods.KINDS)


def test_an_identity_holds_what_differs_from_the_preset_and_nothing_else(small_main, tmp_path):
    plans = [
        Config(settings("at", tmp_path, *words))
        for words in ((), ("beta=1000",), ("at.beta=500",), ("beta=5e2",))
    ]
    found = [plan.identity("student") for plan in plans]
    assert found[0] == found[1] and "options" not in found[0] and found[2] == found[3] != found[0]
    assert found[0] == Config(settings("at", tmp_path)).identity("student")
    assert all("options" not in plan.identity("teacher") for plan in plans)
    assert {
        plan.settings.method
        for plan in (Config(settings("kd+at", tmp_path)), Config(settings("at+kd", tmp_path)))
    } == {"at+kd"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--option", "at.gamma=1"], "option at.gamma is not known, wanted one of at.beta, "),
        (["--option", "at.beta=x"], "option at.beta is 'x', wanted a number"),
        (["--option", "p=0"], "option at: p is 0.0, wanted a finite number of at least 1"),
        (["--option", "beta"], "--option is 'beta', wanted NAME.FIELD=VALUE"),
    ],
)
def test_what_is_no_option_is_one_line(small_main, tmp_path, capsys, flags, words):
    assert small_main(["--output", str(tmp_path / "runs"), "--method", "at", *QUICK, *flags]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and words in err and not (tmp_path / "runs").exists()


def test_a_method_brings_what_its_authors_change_unless_a_recipe_is_named(toys, tmp_path):
    assert RECIPES["digits"].teacher_mode == "eval"
    plan = Config(settings("toy", tmp_path))
    assert plan.recipe.teacher_mode == "train" and plan.identity("student")["teacher_mode"] == "train"
    assert "toy_teacher_mode" not in plan.config() and plan.config()["overrides"] == {"teacher_mode": "train"}
    for more in ({"recipe": "digits"}, {"overrides": {"teacher_mode": "eval"}}):
        assert Config(settings("toy", tmp_path, **more)).recipe == get_recipe("digits", {})
    with pytest.raises(
        UserError, match="--teacher-mode is left open: .*eval by at, train by toy; |eval by at, train by toy"
    ):
        Config(settings("toy+at", tmp_path, "ce.weight=1"))
    with pytest.raises(UserError, match="--option ce.weight is left open"):
        Config(settings("toy+at", tmp_path))
    Config(settings("toy+at", tmp_path, "ce.weight=1", overrides={"teacher_mode": "eval"}))


def test_a_run_of_a_method_with_all_that_one_may_own(toys, small_main, tmp_path, capsys):
    names = "wrapping+bank+scheduled"
    flags = ["--output", str(tmp_path), "--method", names, *QUICK, "--epochs", "2", "--option", "ce.weight=1"]
    assert small_main(flags) == 0, capsys.readouterr().err
    row = rows_of(tmp_path)[-1]
    assert [part.partition("=")[0] for part in row["losses"].split()] == [
        "ce",
        "scheduled",
        "bank",
        "wrapping",
    ]
    state = torch.load(tmp_path / row["folder"] / "last.pt", weights_only=True)
    assert state["method"]["bank.bank"].any() and "neck.conv.weight" in state["model"]
    best = torch.load(tmp_path / row["folder"] / "best.pt", weights_only=True)
    assert "neck.conv.weight" in best["model"]
    assert state["history"][0]["scheduled"] == 0 < state["history"][1]["scheduled"]


def test_what_the_networks_settle_is_no_change_and_has_a_column(small_main, tmp_path):
    """CRD's negatives are a third of the images, and ReviewKD's weight that of the pair, unless given."""
    flags = ["--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--epochs", "1"]
    flags += ["--device", "cpu", "--no-pictures", "--output", str(tmp_path)]
    for method, words in (("crd+reviewkd", []), ("crd+reviewkd", ["crd.k=5", "reviewkd.beta=2"])):
        assert small_main(["--method", method, *flags, *(f"--option={word}" for word in words)]) == 0
    rows = [row for row in rows_of(tmp_path) if row["method"] == "crd+reviewkd"]
    settled, given = ([word.partition("=")[0] for word in row["settled"].split()] for row in rows)
    assert settled == ["crd.k", "reviewkd.beta"] and given == []
    assert changes(rows[0]) == [] and changes(rows[1]) == ["crd.k=5", "reviewkd.beta=2.0"]
