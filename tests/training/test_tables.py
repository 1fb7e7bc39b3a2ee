"""results.csv after a spreadsheet or an editor had it: read, or told in one line at the start; and no row of
a finished run is lost.
"""

from __future__ import annotations

import csv
import io
import runpy
import sys
from pathlib import Path

import pytest
from record_files import rows_in
from support_data import QUICK

from fastkd.report import curves
from fastkd.training import UserError, results
from fastkd.training.results import COLUMNS, append, read_rows, table

ROW = {
    "method": "at", "dataset": "digits", "student": "resnet8", "teacher": "resnet8",
    "start_time": "2026-01-01 00:00:00", "acc": "91.50", "epoch": 2, "nepoch": 3, "lr": 0.05,
    "batch_size": 32, "last_acc": "90.00", "seed": 0, "recipe": "digits", "device": "cpu, 2 threads",
    "overrides": "milestones=0.5 0.75", "folder": "at-0",
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A table of three rows."""
    for i in range(3):
        append(tmp_path, {**ROW, "seed": i, "folder": f"at-{i}"})
    return tmp_path / "results.csv"


def written(path, columns=None, **options):
    """The table as another program would write it."""
    columns, rows = columns or list(COLUMNS), read_rows(path.parent)[1]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


WRITERS = {
    "all quoted": lambda path: written(path, quoting=csv.QUOTE_ALL),
    "single quotes": lambda path: written(path, quotechar="'"),
    "single quotes, semicolons": lambda path: written(
        path, quotechar="'", quoting=csv.QUOTE_ALL, delimiter=";"
    ),
    "semicolons": lambda path: written(path, delimiter=";"),
    "tabs": lambda path: written(path, delimiter="\t"),
    "crlf": lambda path: written(path, lineterminator="\r\n"),
    "cr": lambda path: written(path, lineterminator="\r"),
    "mark": lambda path: "\ufeff" + written(path),
    "mark, semicolons, crlf": lambda path: "\ufeff" + written(path, delimiter=";", lineterminator="\r\n"),
    "empty last lines": lambda path: path.read_text() + "\n\n",
    "no last line end": lambda path: path.read_text().rstrip("\n"),
    "last line of commas": lambda path: path.read_text() + "," * (len(COLUMNS) - 1) + "\n",
    "empty lines": lambda path: path.read_text().replace("\n", "\n\n"),
    "empty column": lambda path: path.read_text().replace("\n", ",\n"),  # a column of nothing
    "comma at an end": lambda path: path.read_text().replace("at-1\n", "at-1,,\n"),  # at the end of one line
    "other order": lambda path: written(
        path, ["folder", *(name for name in reversed(COLUMNS) if name != "folder")]
    ),
    "spaces": lambda path: written(path).replace("no,method", " no , method"),
}


@pytest.mark.parametrize("change", WRITERS.values(), ids=WRITERS)
def test_a_table_that_another_program_wrote_is_read_and_continued(path, change):
    exact = read_rows(path.parent)
    path.write_text(change(path), encoding="utf-8", newline="")
    assert read_rows(path.parent) == exact and [row["folder"] for row in exact[1]] == ["at-0", "at-1", "at-2"]
    assert append(path.parent, {**ROW, "seed": 3, "folder": "at-3"})["no"] == 4
    assert (
        path.read_text().startswith(",".join(COLUMNS) + "\n1,at,digits,")
        and len(read_rows(path.parent)[1]) == 4
    )


def test_columns_of_the_users_own_stay_filled_or_not(path):
    lines = path.read_text().splitlines()
    # Excel leaves empty ends out
    path.write_text("\n".join([lines[0] + ",notes", lines[1] + ",good", *lines[2:]]) + "\n")
    append(path.parent, {**ROW, "folder": "at-3"})
    columns, rows = read_rows(path.parent)
    assert columns == [*COLUMNS, "notes"] and [row["notes"] for row in rows] == ["good", "", "", ""]


DAMAGES = {
    "line 3, is damaged": lambda text: text.replace("2,at,", "2,,at,"),
    "line 4, is damaged": lambda text: text.replace("3,at,", "3;at,"),
    "is damaged": lambda text: text.replace('2 threads"', "2 threads", 1),
    "row 2: acc is '91,50', wanted a number": (
        lambda text: text.replace("91.50", '"91,50"').replace('"91,50"', "91.50", 1)
    ),
    "other columns than this command's: no,method,dataset": lambda text: text.replace(",acc,", ",accuracy,"),
    "has a column twice: acc": lambda text: text.replace(",last_acc,", ",acc,"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_table_is_one_line_before_anything_begins(small_main, path, capsys, words):
    path.write_text(DAMAGES[words](path.read_text()))
    before = path.read_bytes()
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "1", "--output", str(path.parent)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{path}" in err and words in err
    assert path.read_bytes() == before and not [folder for folder in path.parent.iterdir() if folder.is_dir()]


def test_a_row_that_finds_its_table_damaged_is_kept_beside_it_and_added_later(
    small_main, monkeypatch, tmp_path, capsys
):
    """Damaged while the teacher was trained: the student is trained all the same, and both rows are kept."""
    flags = ["--method", "kd", *QUICK, "--epochs", "1", "--output", str(tmp_path)]
    whole, table_path, untouched = results.append, tmp_path / "results.csv", [True]

    def damaged(output, row):
        if untouched:
            untouched.clear()
            table_path.write_text(table(COLUMNS, [{**ROW, "no": 1}]).replace("1,at,", "1,,at,"))
        return whole(output, row)

    monkeypatch.setattr(results, "append", damaged)
    assert small_main(flags) == 2
    out, err = capsys.readouterr()
    asides = sorted(tmp_path.glob("results-*.csv"))
    assert [path.name.split("-")[1] for path in asides] == ["kd", "teacher"]
    assert err.count("\n") == 1 and "line 2, is damaged" in err and f"is kept in {asides[0]}" in err
    assert f"is kept in {asides[1]}" in out and "kd epoch 1/1" in out and "Traceback" not in out
    rows = [rows_in(path)[0] for path in asides]
    assert [row["method"] for row in rows] == ["kd", "teacher"] and all(
        float(row["acc"]) >= 0 for row in rows
    )

    table_path.unlink()
    assert small_main([*flags, "--resume"]) == 0
    added = read_rows(tmp_path)[1]
    assert [row["folder"] for row in added] == [rows[1]["folder"], rows[0]["folder"]] and added[1][
        "acc"
    ] == rows[0]["acc"]
    assert not list(tmp_path.glob("results-*.csv"))


def test_epochs_that_a_spreadsheet_wrote_are_drawn(tmp_path):
    path = tmp_path / "epochs.csv"
    path.write_text("\ufeffepoch;loss\r\n1;0.5\r\n2;0.25\r\n;\r\n", encoding="utf-8")
    assert curves.read_epochs(path) == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    path.write_text("epoch,loss\n1,\n")
    with pytest.raises(UserError, match="epochs.csv cannot be read"):
        curves.read_epochs(path)


def test_the_former_name_of_the_command_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    """``python -m fastkd.training.report``, for one release more: it does what fastkd.report does."""
    found = []
    for name in ("fastkd.report", "fastkd.training.report"):
        monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "no such folder")])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(name, run_name="__main__")
        found.append((end.value.code, capsys.readouterr()))
    assert found[0] == found[1] and found[0][0] == 2
