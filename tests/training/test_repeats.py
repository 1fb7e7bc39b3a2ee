"""Several seeds of one configuration: rows, means, and one teacher."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from record_files import interrupt, rows_of
from run_cases import error_of
from support_data import QUICK

from fastkd.training import UserError, repeat
from fastkd.training.config import Config, Settings
from fastkd.training.groups import described, groups, mean_and_spread


def test_mean_and_sample_deviation():
    assert [mean_and_spread([]), mean_and_spread([91.8]), mean_and_spread([91.80, 92.16, 91.79])] == [
        "–",
        "91.80",
        "91.92 ± 0.21",
    ]


def test_a_group_is_what_differs_in_the_seed_alone_and_a_seed_counts_once():
    common = {
        "method": "at",
        "dataset": "cifar10",
        "student": "resnet20",
        "teacher": "resnet20",
        "recipe": "hankyul2",
        "nepoch": "200",
    }
    rows = [{**common, "seed": seed, "acc": acc} for seed, acc in (("0", "90"), ("1", "91"), ("0", "92"))]
    rows += [
        {**common, name: "other", "seed": "2", "acc": "0"}
        for name in ("overrides", "precision", "teacher_checkpoint", "teacher")
    ]
    found = groups(rows)
    assert [group.seeds for group in found] == [["0", "1"], ["2"], ["2"], ["2"], ["2"]] and found[0].values(
        "acc"
    ) == [92, 91]


def test_a_title_says_what_a_run_was():
    row = {
        "method": "at+kd",
        "dataset": "cifar10",
        "student": "resnet20",
        "teacher": "resnet110",
        "nepoch": 10,
    }
    assert described(row) == "AT+KD on CIFAR-10, resnet20 ← resnet110, 10 epochs"
    alone = {"method": "other", "dataset": "svhn", "student": "resnet8", "teacher": "", "nepoch": "1"}
    assert described(alone) == "other on svhn, resnet8, 1 epoch"


def test_repeats_are_rows_with_a_mean_and_one_teacher(small_main, tmp_path, capsys):
    flags = [
        "--method",
        "kd",
        *QUICK,
        "--epochs",
        "1",
        "--output",
        str(tmp_path),
        "--seed",
        "4",
        "--repeats",
        "3",
    ]
    assert small_main(flags) == 0
    rows = rows_of(tmp_path)
    assert [(row["method"], row["seed"], row["teacher_seed"]) for row in rows] == [
        ("teacher", "4", ""),
        ("kd", "4", "4"),
        ("kd", "5", "4"),
        ("kd", "6", "4"),
    ]
    assert len(list(tmp_path.glob("teachers/*.pt"))) == 1
    mean = mean_and_spread([float(row["acc"]) for row in rows[1:]])
    assert (
        "±" in mean
        and f"3 runs, seeds 4 5 6: acc {mean} %, reported_acc {mean} %"
        in capsys.readouterr().out.splitlines()[-1]
    )
    section = (tmp_path / "results.md").read_text().split("## Means over seeds")[1]
    assert "| 4 5 6 |" in section and mean in section
    # one of them alone, by its command, is the same run
    again = json.loads((tmp_path / rows[2]["folder"] / "config.json").read_text())["command"]
    words = shlex.split(again)
    assert small_main(words[words.index("train.py") + 1 :]) == 0
    rows = rows_of(tmp_path)
    assert rows[4]["acc"] == rows[2]["acc"] and rows[4]["losses"] == rows[2]["losses"]
    assert "| 4 5 6 |" in (tmp_path / "results.md").read_text()  # the same seed again is no fourth sample


def test_repeats_that_were_stopped_go_on(small_main, monkeypatch, tmp_path, capsys):
    flags = ["--method", "kd", *QUICK, "--epochs", "2", "--output", str(tmp_path), "--repeats", "3"]
    mended = interrupt(monkeypatch, 2 + 2 + 2)  # in the second student
    assert small_main(flags) == 130
    mended()
    assert [row["method"] for row in rows_of(tmp_path)] == ["teacher", "kd"]
    capsys.readouterr()
    assert small_main([*flags, "--resume"]) == 0
    out = capsys.readouterr().out
    assert (
        "seed 0, run 1 of 3: finished, row 2" in out
        and "goes on after epoch 1 of 2" in out
        and "3 runs, seeds 0 1 2" in out
    )
    assert [(row["method"], row["seed"]) for row in rows_of(tmp_path)] == [
        ("teacher", "0"),
        ("kd", "0"),
        ("kd", "1"),
        ("kd", "2"),
    ]
    assert small_main([*flags, "--resume"]) == 0  # all are there: only the means
    assert len(rows_of(tmp_path)) == 4 and "3 runs, seeds 0 1 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("times", "resume", "words"),
    [
        (0, None, "--repeats is 0"),
        (2, "folder", "leave the folder out"),
        (2, "", "without --resume it begins"),
    ],
)
def test_repeats_that_cannot_be(small_main, tmp_path, times, resume, words):
    with pytest.raises(UserError, match=words):
        repeat(
            Settings("kd", "digits", teacher="resnet8", student="resnet8", output=tmp_path, resume=resume),
            times,
        )


def test_a_shared_teacher_makes_another_run_of_a_seed(small_main, tmp_path):
    common = {"dataset": "digits", "student": "resnet8", "output": tmp_path, "seed": 1}
    plans = [Config(Settings("kd", teacher="resnet8", teacher_seed=seed, **common)) for seed in (None, 1, 0)]
    own, same, shared = (plan.identity("student") for plan in plans)
    assert own == same != shared and plans[0].teacher_path() != plans[2].teacher_path()
    assert plans[2].identity("teacher")["seed"] == 0 and shared["seed"] == 1
    first, other = (next(plan.batches("teacher")[0].train(1))[1] for plan in (plans[0], plans[2]))
    assert not torch.equal(first, other)
    alone = [Config(Settings("baseline", teacher_seed=seed, **common)) for seed in (None, 0)]
    assert alone[0].identity("student") == alone[1].identity("student")


def test_a_seed_that_fails_does_not_end_the_others(small_main, tmp_path, monkeypatch, capsys):
    """Of three seeds the second one's loss is no number; the others are there, and --resume does it again."""
    from fastkd.training import Trainer

    means, broken = Trainer._means, [1]

    def failing(self, epoch):
        if self.teacher is not None and self.batches.seed in broken:
            raise UserError("the loss is no longer finite")
        return means(self, epoch)

    monkeypatch.setattr(Trainer, "_means", failing)
    flags = ["--method", "kd", *QUICK, "--epochs", "1", "--output", str(tmp_path), "--repeats", "3"]
    told = error_of(small_main, capsys, flags, status=1)
    assert told.endswith("seed 1: the loss is no longer finite; the other 2 of 3 runs are finished\n")
    assert [row["seed"] for row in rows_of(tmp_path)] == ["0", "0", "2"]
    broken.clear()
    assert small_main([*flags, "--resume", "auto"]) == 0
    out = capsys.readouterr().out
    assert out.count("finished, row") == 2 and "3 runs, seeds 0 1 2: acc " in out
    broken[:] = [7, 8]  # of which no seed is finished
    flags = [*flags[:-2], "--seed", "7", "--repeats", "2", "--teacher-seed", "0"]
    told = error_of(small_main, capsys, flags)
    assert told.endswith("seed 7: the loss is no longer finite; seed 8: the loss is no longer finite\n")


def test_a_teacher_that_fails_ends_all_seeds(small_main, tmp_path, monkeypatch, capsys):
    from fastkd.training import Trainer

    def failing(self, epoch):
        raise UserError("the loss is no longer finite")

    monkeypatch.setattr(Trainer, "_means", failing)
    flags = ["--method", "kd", *QUICK, "--epochs", "1", "--output", str(tmp_path), "--repeats", "3"]
    told = error_of(small_main, capsys, flags)
    assert told.endswith("error: the loss is no longer finite\n")
