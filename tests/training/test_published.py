"""The published tables with ours beside them, and the curves."""

from __future__ import annotations

import statistics

import pytest

from fastkd.methods import METHODS
from fastkd.models import MODELS
from fastkd.report import command as report
from fastkd.report import curves, page, tables
from fastkd.report.published import SELF, TABLES
from fastkd.training import DATASETS, RECIPES
from fastkd.training.results import COLUMNS, table

RUN = {
    "method": "at", "dataset": "cifar10", "student": "resnet_32_20", "teacher": "resnet_32_20",
    "recipe": "hankyul2", "nepoch": "200", "precision": "fp32", "seed": "0", "acc": "95",
    "reported_acc": "92.00", "train_acc": "99", "losses": "ce=0.1 at=1.5", "overrides": "",
}  # fmt: skip


def lines(rows, which=0):
    """{label of the row: {label of the line: cells}} of a published table."""
    found, label = {}, ""
    for first, second, *cells in report.tables(rows)[which][2]:
        label = first or label
        found.setdefault(label, {})[second] = cells
    return found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.source[:10])
def test_a_published_table_names_what_there_is(table):
    assert (
        table.recipe in RECIPES
        and set(table.dataset) <= set(DATASETS)
        and len(table.dataset) == len(table.columns)
    )
    for _, entries in table.rows:
        assert len(entries) == len(table.columns)
        for entry in entries:
            assert (
                entry.method in ("", "teacher", "at+kd", "norm+kd", *METHODS)
                and entry.student in MODELS
                and entry.teacher in ("", *MODELS)
            )
            assert (
                bool(entry.teacher) == (entry.method not in ("", "teacher", "baseline")) or not entry.method
            )
            if entry.runs:
                assert entry.value == pytest.approx(statistics.mean(entry.runs), abs=0.06)
    for _, ours in table.variants:
        assert set(ours.values()) <= set(MODELS)


def test_figures_are_those_that_were_published():
    """A line of each table, from its source."""
    rows = [dict(table.rows) for table in TABLES]
    assert [entry.value for entry in rows[0]["ST + AT"]] == [92.6, 68.7, 93.7, 73.7]
    assert [entry.value for entry in rows[1]["validation accuracy"]] == [89.91, 88.40, 88.19, None]
    assert [entry.value for entry in rows[2]["SAKD"]] == [71.92, 74.38, 74.36, 76.24, 74.97, 75.92]
    assert lines([])["AT"]["published"] == ["91.9 ± 0.2", "68.4 ± 0.4", "93.3 ± 0.1", "72.6 ± 0.4"]
    assert lines([], 2)["ReviewKD"] == {
        "published": ["71.89", "73.34", "73.89", "74.83", "75.09", "n/a"],
        "ours": ["–"] * 6,
    }
    assert lines([], 1)["parameters"]["ours"] == lines([], 1)["parameters"]["published"]


def test_every_method_has_a_row_that_its_runs_fill():
    """Setting a, two of 240 epochs: the cell of a run is in its method's row, in no other one."""
    run = {**RUN, "dataset": "cifar100", "student": "resnet20", "teacher": "resnet56", "recipe": "sakd"}
    labels = {entry.method: label for label, entries in TABLES[2].rows for entry in entries}
    assert set(labels) == {"teacher", "norm+kd", *METHODS} - {"dkd", "fsp", "norm"}
    for method, label in labels.items():
        own = {"student": "resnet56"} if method == "teacher" else {}
        row = {**run, **own, "method": method, "nepoch": "2", "overrides": "epochs=2"}
        if method in ("teacher", "baseline"):
            row["teacher"] = ""
        found = {name: cells for name, cells in lines([row], 2).items() if "ours, 2 of 240 epochs" in cells}
        assert list(found) == [label], method
        assert found[label]["ours, 2 of 240 epochs"][0] == RUN["reported_acc"]


def test_what_was_not_run_is_a_dash():
    for which in (0, 1, 2):
        for label, found in lines([], which).items():
            assert set(found["ours"]) == {"–"} or label == "parameters"


def test_whole_runs_are_a_mean_a_spread_and_a_difference():
    rows = [
        {**RUN, "seed": str(seed), "reported_acc": acc}
        for seed, acc in enumerate(("92.00", "92.10", "92.20"))
    ]
    assert lines(rows)["AT"]["ours"] == ["92.10 ± 0.10 [3] (+0.20)", "–", "–", "–"]
    assert lines(rows[:1])["AT"]["ours"][0] == "92.00 (+0.10)"
    assert set(lines(rows)["FSP"]["ours"]) == {"–"}
    counted = lines([{**RUN, "overrides": "epochs=200"}])["AT"]
    assert counted["ours"][0] == "92.00 (+0.10)"
    other = {**RUN, "teacher_checkpoint": "other.pt", "reported_acc": "50.00"}
    for both in ([*rows, other], [other, *rows]):  # the one of more seeds
        assert lines(both)["AT"]["ours"][0] == "92.10 ± 0.10 [3] (+0.20)"


@pytest.mark.parametrize(
    "change",
    [
        {"overrides": "epochs=200 lr=0.2"},
        {"overrides": "batch_size=64"},
        {"processes": "2"},
        {"recipe": "kdzoo"},
        {"dataset": "fashion-mnist"},
        {"teacher": "resnet56"},
        {"student": "wrn_16_2"},
        {"method": "at2"},
    ],
    ids=str,
)
def test_another_configuration_does_not_count(change):
    others = [{**RUN, **change}, {**RUN, "method": "other"}]
    assert lines(others)["AT"] == lines([])["AT"]


def test_shortened_runs_other_stems_and_precisions_have_lines_of_their_own():
    short = {**RUN, "nepoch": "10", "overrides": "epochs=10", "reported_acc": "87.00"}
    stem = {**RUN, "student": "resnet20", "teacher": "resnet20", "precision": "bf16"}
    found = lines([short, stem])["AT"]
    assert list(found) == ["published", "ours, 3×3 stem, bf16", "ours, 10 of 200 epochs"]
    assert (
        found["ours, 10 of 200 epochs"][0] == "87.00" and found["ours, 3×3 stem, bf16"][0] == "92.00 (+0.10)"
    )
    assert list(lines([short])["AT"]) == ["published", "ours", "ours, 10 of 200 epochs"]
    assert set(lines([short])["AT"]["ours"]) == {"–"}
    assert list(lines([{**RUN, "precision": "bf16"}, RUN])["AT"]) == ["published", "ours", "ours, bf16"]


def test_losses_and_training_accuracies_have_their_figures():
    row = {
        **RUN,
        "method": "at+kd",
        "student": "wrn_16_2",
        "teacher": "wrn_40_2",
        "losses": "ce=0.1 at=1.25 kd=0.5",
    }
    found = lines([row], 1)
    assert [
        found[name]["ours"][2] for name in ("train loss", "train accuracy", "AT loss", "validation accuracy")
    ] == ["1.85 (+0.10)", "99.00 (+8.85)", "1.25 (+0.08)", "92.00 (+3.81)"]


@pytest.fixture
def committed(tmp_path):
    """Tables and epochs of two runs, as they are kept beside the code: no configurations, no weights."""
    folder = tmp_path / "experiments"
    rows = [{"no": i + 1, **RUN, "method": method, "folder": method} for i, method in enumerate(("at", "kd"))]
    for row in rows:
        (folder / row["folder"]).mkdir(parents=True)
        epochs = [
            {
                "epoch": e,
                "loss": 2 / e,
                "ce": 1 / e,
                row["method"]: 1 / e,
                "train_acc": 50 + e,
                "test_acc": 40 + e,
            }
            for e in (1, 2, 3)
        ]
        (folder / row["folder"] / "epochs.csv").write_text(table(list(epochs[0]), epochs))
    (folder / "results.csv").write_text(table(COLUMNS, rows))
    return folder


def test_the_command_prints_the_tables_and_all_runs(committed, capsys):
    assert report.main([str(committed)]) == 0
    out = capsys.readouterr().out
    assert "92.00 (+0.10)" in out and out.count("published") > 20 and "All runs" in out
    widths = {len(line) for line in out.split("\n\n")[1].splitlines()}
    assert max(widths) < 140
    assert report.main([str(committed), "--only", "method=kd"]) == 0
    assert "92.00 (+0.10)" not in capsys.readouterr().out


def test_the_tables_go_between_the_markers(committed, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(committed), "--into", str(readme)]) == 0
    first = readme.read_text()
    assert (
        first.startswith(f"before\n{report.BEGIN}\n")
        and first.endswith(f"\n{report.END}\nafter\n")
        and "old" not in first
    )
    block = next(part for part in first.split("\n\n") if part.startswith("|")).splitlines()
    assert len({line.count("|") for line in block}) == 1 and len(block) == 2 + 2 * len(SELF.rows)
    assert report.main([str(committed), "--into", str(readme)]) == 0 and readme.read_text() == first
    readme.write_text("nothing")
    assert report.main([str(committed), "--into", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err and readme.read_text() == "nothing"


def test_curves_of_finished_and_unfinished_runs(committed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    unfinished = committed / "fsp"
    unfinished.mkdir()
    (unfinished / "epochs.csv").write_text((committed / "at" / "epochs.csv").read_text())
    (unfinished / "config.json").write_text(
        '{"trained": "fsp", "dataset": "cifar10", "recipe": "hankyul2", "seed": 0, "precision": "fp32",'
        ' "model": "resnet20", "identity": {"teacher": "resnet110"}, "fields": {"epochs": 200},'
        ' "overrides": {}}'
    )
    (committed / "foreign").mkdir()
    (committed / "foreign" / "epochs.csv").write_text("a,b\n")
    found = list(curves.read([committed], {}))
    assert [curve.label for curve in found] == [
        "AT, resnet_32_20 ← resnet_32_20",
        "FSP, resnet20 ← resnet110, unfinished",
        "KD, resnet_32_20 ← resnet_32_20",
    ]
    assert [*curves.read([committed], {"student_checkpoint": ""})] == found
    assert [epoch["test_acc"] for epoch in found[0].epochs] == [41, 42, 43]
    assert len({curve.place for curve in found}) == 1

    drawn = []
    from matplotlib.axes import Axes

    plotted = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **style: (drawn.append((list(x), list(y))), plotted(self, x, y, **style))[1],
    )
    for name in ("curves.png", "curves.svg"):
        assert report.main([str(committed), "--plot", str(tmp_path / name)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (
        tmp_path / "curves.svg"
    ).read_bytes()
    # test and training accuracy and the loss of three runs, AT of two files, KD of one
    assert len(drawn) == 2 * (3 * 3 + 2 + 1) and drawn.count(([1, 2, 3], [41, 42, 43])) == 2 * 3
    capsys.readouterr()
    assert report.main([str(committed), "--plot", str(tmp_path / "curves.docx")]) == 2
    assert "docx" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["folder", "runs", "matplotlib", "epochs"])
def test_what_the_report_cannot_do_is_one_line(committed, tmp_path, monkeypatch, capsys, what):
    import sys

    arguments = {"folder": [str(tmp_path / "none")], "runs": [str(tmp_path / "empty"), "--plot", "x.png"]}
    (tmp_path / "empty").mkdir()
    if what == "matplotlib":
        for name in ("matplotlib", "matplotlib.figure"):
            monkeypatch.setitem(sys.modules, name, None)
    elif what != "folder":
        pytest.importorskip("matplotlib")
    if what == "epochs":
        (committed / "at" / "epochs.csv").write_text("epoch,loss\n1,many\n")
    assert report.main(arguments.get(what, [str(committed), "--plot", str(tmp_path / "x.png")])) == 2
    err = capsys.readouterr().err
    words = {
        "folder": "no such folder",
        "runs": "no runs with an epochs.csv",
        "matplotlib": "takes matplotlib",
        "epochs": "epochs.csv cannot be read",
    }
    assert len(err.splitlines()) == 1 and words[what] in err and not (tmp_path / "x.png").exists()


def test_the_report_says_what_a_published_figure_is():
    """Runs, spread and epoch of each source, "not stated" where it says nothing; before our own runs."""
    made = report.tables([RUN])
    caption, heads, rows = made[-2]
    assert caption == "What a published figure is" and heads == [
        "source",
        "figures",
        "runs",
        "spread",
        "epoch",
    ]
    assert {table.source for table in TABLES if table is not TABLES[1]} <= {row[0] for row in rows}
    found = {(source, figures): rest for source, figures, *rest in rows}
    assert found["hankyul2/KnowledgeDistillation", "AT, FSP"] == ["3", "each run is published", "best"]
    assert found["HobbitLong/RepDistiller", "its README"] == ["5", "not stated", "last"]
    assert found["experiment note", "all"] == ["not stated"] * 3
    assert all(entry.runs for entry in dict(SELF.rows)["AT"] + dict(SELF.rows)["FSP"])
    assert "| HobbitLong/RepDistiller | its README | 5 | not stated | last |" in report.markdown([RUN])


def test_runs_on_other_data_have_no_published_tables(tmp_path, capsys):
    row = {**RUN, "dataset": "folder:images", "no": "1"}
    (tmp_path / "results.csv").write_text(table(COLUMNS, [row]))
    assert report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("All runs: ") and "ublished" not in out
    assert "ublished" not in tables.markdown([row])
    assert "<p>None is known for these data sets.</p>" in page.page([row], [tmp_path], {})
    both = [caption for caption, *_ in tables.tables([row, RUN])]
    assert len(both) > len(TABLES) and "What a published figure is" in both
