"""Grids of options: the runs of a command, what is refused before any of them, and accuracy by value."""

from __future__ import annotations

import pytest
from record_files import rows_of
from run_cases import error_of
from support_data import QUICK

from fastkd.report import command, page
from fastkd.training import Settings, UserError, by_option
from fastkd.training.sweep import labels, points


def options_of(method, *options):
    return [(one.method, *one.options) for one in points(Settings(method, "digits", options=options))]


def test_commas_span_a_grid_and_colons_are_a_tuple():
    assert options_of("at+kd", "at.beta=250,500", "kd.temperature=2,4", "at.weights=1:2:3") == [
        ("at+kd", f"at.beta={beta}", f"kd.temperature={temperature}", "at.weights=1:2:3")
        for beta in (250, 500)
        for temperature in (2, 4)
    ]
    assert options_of("kd") == [("kd",)] and options_of("at", "beta=3") == [("at", "beta=3")]
    # each method takes the options of its own terms; AFD's authors add KD to it, and all have cross-entropy
    assert options_of("kd,at,afd,baseline", "kd.temperature=2,4", "at.beta=5", "ce.weight=1") == [
        ("kd", "kd.temperature=2", "ce.weight=1"),
        ("kd", "kd.temperature=4", "ce.weight=1"),
        ("at", "at.beta=5", "ce.weight=1"),
        ("afd", "kd.temperature=2", "ce.weight=1"),
        ("afd", "kd.temperature=4", "ce.weight=1"),
        ("baseline", "ce.weight=1"),
    ]
    some = [Settings("kd", options=("kd.temperature=2", f"kd.weight={w}")) for w in (1, 2)]
    assert labels([*some, Settings("at", options=("at.beta=5",))]) == [
        "kd kd.weight=1",
        "kd kd.weight=2",
        "at",
    ]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("at.beta=250,,500", "--option at.beta=250,,500: a value of the grid is empty"),
        ("at.beta=250,500,250", "--option at.beta=250,500,250: the grid has 250 twice"),
        ("at.beta=250,250.0", "at at.beta=250.0 is the same run as at at.beta=250: give each value once"),
        ("at.beta=250,much", "option at.beta is 'much', wanted a number"),
        ("at.beta=1,inf", "option at.beta is 'inf', wanted a number"),
        ("at.alpha=1,2", "option at.alpha is not known, wanted one of"),
        ("crd.k=4,8", "method at has no term 'crd'"),
    ],
)
def test_a_bad_point_is_one_line_before_any_training(small_main, tmp_path, capsys, option, words):
    flags = ["--method", "at", *QUICK, "--output", str(tmp_path), "--option", option]
    assert words in error_of(small_main, capsys, flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_goes_on_with_one_run(small_main, tmp_path):
    with pytest.raises(UserError, match="with several methods or values of an option leave the folder out"):
        from fastkd.training import repeat

        repeat(Settings("kd", "digits", options=("temperature=2,4",), output=tmp_path, resume="folder"))


def test_a_grid_over_seeds_goes_on_and_is_reported_by_value(small_main, tmp_path, monkeypatch, capsys):
    flags = ["--method", "at+kd", *QUICK, "--epochs", "1", "--output", str(tmp_path), "--repeats", "2"]
    flags += ["--option", "at.beta=500,1000", "--option", "kd.temperature=4", "--resume", "auto"]
    from fastkd.training import repeats, together

    whole = together.run

    def stopped(configs):  # Ctrl-C as the second seed begins
        if configs[0].settings.seed == 1:
            raise KeyboardInterrupt
        return whole(configs)

    with monkeypatch.context() as patch:
        patch.setattr(repeats.together, "run", stopped)
        assert small_main(flags) == 130 and len(rows_of(tmp_path)) == 3
    capsys.readouterr()
    assert small_main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("finished, row") == 2 and "2 students side by side: at+kd at.beta=500, at+kd at" in out
    rows = rows_of(tmp_path)
    assert [row["seed"] for row in rows] == ["0", "0", "0", "1", "1"]
    assert {row["teacher_seed"] for row in rows[1:]} == {"0"} and len([*tmp_path.glob("teachers/*.pt")]) == 1
    last = out.splitlines()[-3:]
    assert last[0].startswith("at+kd at.beta=500   acc ") and last[1].startswith("at+kd at.beta=1000  acc ")
    assert "±" in last[0] and last[2].startswith("4 runs, seeds 0 1 (mean ± sample standard deviation); kept")

    ((caption, heads, lines),) = by_option.tables(rows)
    assert caption == "Accuracy by option: AT+KD on digits, resnet8 ← resnet8, 1 epoch"
    assert heads == ["at.beta", "runs", "best", "reported"]
    assert [line[:2] for line in lines] == [["500.0", "2"], ["1000.0", "2"]]
    assert [line[2] for line in lines] == [text.split("acc ")[1].split(" %")[0] for text in last[:2]]
    assert command.main([str(tmp_path)]) == 0
    assert "Accuracy by option: AT+KD on digits" in capsys.readouterr().out
    assert "<caption><span>Accuracy by option: AT+KD on digits" in page.page(rows, [tmp_path], {})


def row(seed=0, **changes):
    common = {"method": "at", "dataset": "cifar10", "student": "resnet20", "teacher": "resnet20"}
    rest = {"recipe": "hankyul2", "nepoch": "200", "seed": seed, "acc": "90", "reported_acc": "89"}
    return {**common, **rest, **changes}


def test_runs_of_any_commands_stand_by_value_in_the_order_of_numbers():
    rows = [
        row(overrides="lr=0.2 at.beta=500.0", acc="91"),
        row(overrides="at.beta=1500.0"),
        row(),  # the preset's
        row(overrides="at.beta=500.0", acc="93"),
        row(seed=1, overrides="at.beta=500.0", acc="92"),
        row(method="kd", overrides="kd.temperature=2.0"),  # alone: nothing to compare
        row(method="gone", overrides="gone.x=1"),
        row(method="gone"),
    ]
    (first, gone) = by_option.tables(rows)
    assert first[2] == [
        ["500.0", "2", "92.50 ± 0.71", "89.00 ± 0.00"],
        ["1000.0", "1", "90.00", "89.00"],
        ["1500.0", "1", "90.00", "89.00"],
    ]
    assert gone[2] == [["1", "1", "90.00", "89.00"], ["–", "1", "90.00", "89.00"]]
    two = [row(overrides=f"at.beta={beta} ce.weight=0.5") for beta in (1.0, 2.0)]
    assert by_option.tables([*two, row(overrides="at.beta=3.0")])[0][1:] == (
        ["at.beta", "ce.weight", "runs", "best", "reported"],
        [[beta, ce, "1", "90.00", "89.00"] for beta, ce in (("1.0", "0.5"), ("2.0", "0.5"), ("3.0", "1.0"))],
    )
    assert by_option.tables(two)[0][0].endswith("200 epochs, ce.weight=0.5")
