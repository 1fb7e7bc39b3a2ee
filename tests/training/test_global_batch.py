"""A run is judged, and told, by the batch of all its processes together."""

from __future__ import annotations

import pytest

from fastkd.report import command as report
from fastkd.report import curves, tables
from fastkd.training import RECIPES, results
from fastkd.training.config import Config, Settings
from fastkd.training.groups import changes, groups
from fastkd.training.run_summary import describe

RUN = {
    "method": "at", "dataset": "cifar100", "student": "resnet20", "teacher": "resnet56", "recipe": "sakd",
    "nepoch": "240", "precision": "fp32", "seed": "0", "acc": "72", "reported_acc": "71.00", "overrides": "",
    "processes": "1",
}  # fmt: skip

CASES = [  # overrides, processes, what is changed
    ("", "", []),  # of a table without the column
    ("", "1", []),
    ("epochs=24", "1", []),
    ("batch_size=64", "1", []),
    ("batch_size=32", "2", []),
    ("batch_size=32", "1", ["batch_size=32"]),
    ("", "2", ["batch_size=64×2"]),
    ("batch_size=64", "2", ["batch_size=64×2"]),
    ("lr=0.05", "1", []),
    ("lr=0.1 batch_size=32", "2", ["lr=0.1"]),
    ("milestones=0.25 0.5 lr=0.05", "1", ["milestones=0.25 0.5"]),
    ("milestones=0.625 0.75 0.875", "1", []),
    ("init_milestones=", "1", []),
]


@pytest.mark.parametrize(("overrides", "processes", "changed"), CASES)
def test_a_change_is_what_differs_from_the_recipe(overrides, processes, changed):
    short = "epochs=" in overrides
    row = {**RUN, "overrides": overrides, "processes": processes, "nepoch": "24" if short else "240"}
    assert changes(row) == changed
    lines = tables.lines_of(tables.TABLES[2], dict(tables.TABLES[2].rows)["AT"], groups([row]))
    figures = ["–"] if changed else ["–", "71.00"] if short else ["71.00 (+0.29)"]
    assert [cells[0] for _, cells in lines] == figures
    assert curves.Curve({**row, "finished": "yes"}, []).label == ", ".join(
        ["AT", "resnet20 ← resnet56", *changed]
    )


@pytest.mark.parametrize(
    ("method", "recipe", "overrides", "changed"),
    [
        ("sakd", "repdistiller", "momentum=0.8 new_optimizer=True teacher_mode=train", []),
        ("sakd", "repdistiller", "momentum=0.7 new_optimizer=True teacher_mode=train", ["momentum=0.7"]),
        ("at", "repdistiller", "momentum=0.8 teacher_mode=train", ["momentum=0.8", "teacher_mode=train"]),
        ("semckd", "digits", "semckd.beta=40.0", []),
        ("semckd", "digits", "semckd.beta=50.0", ["semckd.beta=50.0"]),
        ("semckd", "repdistiller", "semckd.beta=40.0", ["semckd.beta=40.0"]),
    ],
)
def test_what_a_method_or_a_recipe_brings_is_no_change(method, recipe, overrides, changed):
    row = {**RUN, "method": method, "recipe": recipe, "overrides": overrides, "processes": "1"}
    assert changes(row) == changed


def test_milestones_above_are_the_recipes():
    assert RECIPES["sakd"].milestones == (0.625, 0.75, 0.875)


def test_means_are_over_runs_of_as_many_processes():
    rows = [
        {**RUN, "seed": seed, "processes": processes}
        for seed, processes in (("0", ""), ("1", "1"), ("0", "2"), ("1", "2"))
    ]
    found = groups(rows)
    assert [group.seeds for group in found] == [["0", "1"], ["0", "1"]]
    assert [group.cells[-1] for group in found] == ["", "processes=2"] and "| processes=2 |" in results.means(
        rows
    )
    _, heads, lines = report.tables(rows)[-1]
    assert [line[heads.index("changed")] for line in lines] == ["", "processes=2"]


@pytest.mark.parametrize(
    ("processes", "batch", "words"),
    [
        (1, None, None),
        (2, 64, None),
        (1, 256, "note     a step has 256 images; hankyul2's learning rate of 0.1 is for 128"),
        (
            2,
            None,
            (
                "note     a step has 256 images; hankyul2's learning rate of 0.1 is for 128: --batch-size 64"
                " in each of 2 processes"
            ),
        ),
        (3, None, "note     a step has 384 images; hankyul2's learning rate of 0.1 is for 128"),
    ],
)
def test_another_batch_than_the_recipes_is_told_with_the_rates_own(
    monkeypatch, tmp_path, processes, batch, words
):
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (0, processes))
    fields = {} if batch is None else {"batch_size": batch}
    plan = Config(
        Settings(
            "baseline",
            "digits",
            student="resnet8",
            recipe="hankyul2",
            output=tmp_path,
            device="cpu",
            overrides=fields,
        )
    )
    assert [line for line in describe(plan).splitlines() if line.startswith("note")] == (
        [words] if words else []
    )
