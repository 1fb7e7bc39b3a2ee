"""The published tables with our figures beside them, the means over seeds, and the curves.

    python -m fastkd.report runs                              prints the tables
    python -m fastkd.report runs --plot curves.png            and draws the curves of the runs
    python -m fastkd.report runs --into README.md             writes the tables between its markers instead

A run counts beside a published figure if data set, student, teacher, method and recipe agree and no field of
the recipe was changed, the batch being that of all processes together; with other ``--epochs`` it has a line
of its own that says so, and no difference.
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.io.console import delivered, screens
from fastkd.io.files import as_path, write
from fastkd.methods import title_of
from fastkd.models import create_model
from fastkd.report import curves
from fastkd.report.published import NOTE, TABLES, Entry, Published
from fastkd.training import results
from fastkd.training.groups import Group, changes, groups, mean_and_spread, number
from fastkd.training.recipes import RECIPES

BEGIN, END = "<!-- experiments:begin -->", "<!-- experiments:end -->"
DASH = "–"


def read(folders: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of all of them. Raises UserError for a folder that is none, or no runs'."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    return [row for folder in folders for row in results.read_rows(folder)[1]]


def check_wanted(wanted: Sequence[tuple[str, str, str]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a column that no run has, or a value that none has there; the line lists those
    that there are.
    """
    columns = dict.fromkeys(name for row in rows for name in row)
    for name, _, value in wanted:
        if name not in columns:
            raise UserError(
                f"--only {name}: no such column; known:"
                f" {', '.join(columns) or 'none, since there are no runs'}"
            )
        known = dict.fromkeys(str(row.get(name) or "") for row in rows)
        if value not in known:
            raise UserError(
                f"--only {name}={value}: no run has that; known:"
                f" {', '.join(text or 'nothing' for text in known)}"
            )
    if wanted and not any(
        all(str(row.get(name) or "") == value for name, _, value in wanted) for row in rows
    ):
        raise UserError(
            f"--only: no run has {' and '.join(f'{name}={value}' for name, _, value in wanted)} together"
        )


def figure(row: Any, name: str) -> float | None:
    """A column of ``row``; the loss of a term, or of all."""
    terms = dict(part.split("=", 1) for part in (row.get("losses") or "").split() if "=" in part)
    if name == "loss":
        values = [number(value) for value in terms.values()]
        return sum(value for value in values if value is not None) if values and None not in values else None
    return number(terms.get(name, row.get(name)))


def lines_of(
    table: Published, entries: Sequence[Entry], found: Iterable[Group]
) -> list[tuple[str, list[str]]]:
    """(label, a cell a column) of what we have for a row of ``table``: first whole runs, a line of dashes at
    least, then shortened ones.
    """
    whole = RECIPES[table.recipe].epochs
    best: dict[tuple[int, int, str], dict[int, Group]] = {}
    for group in found:
        epochs = int(number(group.key["nepoch"]) or 0)
        if group.key["recipe"] != table.recipe or changes(group.key):
            continue
        for place, (entry, dataset) in enumerate(zip(entries, table.dataset, strict=True)):
            for variant, (_, ours) in enumerate(table.variants):
                wanted = (
                    entry.method,
                    dataset,
                    ours.get(entry.student, entry.student),
                    ours.get(entry.teacher, entry.teacher),
                )
                if wanted == tuple(group.key[name] for name in ("method", "dataset", "student", "teacher")):
                    cells = best.setdefault((epochs, variant, group.key["precision"]), {})
                    if place not in cells or len(group.rows) >= len(cells[place].rows):
                        cells[place] = group
    lines = []
    for (epochs, variant, precision), cells in sorted(
        best.items(), key=lambda item: (-item[0][0], item[0][1], item[0][2] != "fp32")
    ):
        notes = [
            table.variants[variant][0],
            precision if precision != "fp32" else "",
            f"{epochs} of {whole} epochs" if epochs != whole else "",
        ]
        text = [
            cell(entry, cells.get(place), epochs == whole, table.digits)
            for place, entry in enumerate(entries)
        ]
        lines.append((", ".join(["ours", *filter(None, notes)]), text))
    if not any(epochs == whole for epochs, _, _ in best):
        lines.insert(0, ("ours", [DASH] * len(entries)))
    return lines


def cell(entry: Entry, group: Group | None, whole: bool, digits: int) -> str:
    """Our figure, its spread, and for a whole run what it is above the published one."""
    values = (
        []
        if group is None
        else [value for value in (figure(row, entry.figure) for row in group.rows) if value is not None]
    )
    if not values:
        return DASH
    mean, digits = sum(values) / len(values), max(digits, 2)
    runs = f" [{len(values)}]" if len(values) > 1 else ""
    return (
        mean_and_spread(values, digits)
        + runs
        + (f" ({mean - entry.value:+.{digits}f})" if whole and entry.value is not None else "")
    )


def tables(rows: Sequence[dict[str, str]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, heads, rows of cells) of every published table and of our own means."""
    found, made = groups(rows), []
    for table in TABLES:
        lines = []
        if table is NOTE:
            counts = [
                sum(p.numel() for p in create_model(entry.student).parameters()) for entry in table.rows[0][1]
            ]
            lines += [
                ["parameters", "published", "2,243,546", "691,674", "691,674", "691,674"],
                ["", "ours", *(f"{count:,}" for count in counts)],
            ]
        for label, entries in table.rows:
            lines.append([label, "published", *(entry.published(table.digits) for entry in entries)])
            if any(entry.method for entry in entries):
                lines += [["", name, *cells] for name, cells in lines_of(table, entries, found)]
        made.append(
            (
                f"{table.title} ({table.source}; {RECIPES[table.recipe].epochs} epochs)",
                ["", "", *table.columns],
                lines,
            )
        )
    if found:
        heads = [
            "method",
            "dataset",
            "student",
            "teacher",
            "recipe",
            "epochs",
            "precision",
            "changed",
            "runs",
            "best",
            "reported",
        ]
        own = []
        for group in found:
            method, *rest = group.cells
            line = [
                title_of(method),
                *rest,
                str(len(group.rows)),
                group.spread("acc"),
                group.spread("reported_acc"),
            ]
            own.append(line)
        made.append(
            (
                (
                    "All runs: test accuracy in percent, of the best epoch and of the one that the recipe"
                    " reports"
                ),
                heads,
                own,
            )
        )
    return made


NOTES = (
    "Ours: mean ± sample standard deviation [seeds] (ours minus published), of the epoch that the recipe"
    " reports; – is not run, and rows without a line of ours are methods that fastkd has not."
)


def plain(heads: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(wide, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            text + " " * (width - wide(text)) for text, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in [heads, *rows]
    )


def wide(text: str) -> int:
    return sum(not unicodedata.combining(character) for character in text)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    parts = [NOTES]
    for caption, heads, lines in tables(rows):
        names = [head or " " * i for i, head in enumerate(heads)]  # two without a name
        parts += [
            f"**{caption}**",
            results.markdown(names, [dict(zip(names, line, strict=True)) for line in lines]).rstrip(),
        ]
    return "\n\n".join(parts)


def put(path: Path, text: str) -> None:
    """Writes ``text`` between the markers of ``path``. Raises UserError."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise UserError(
            f"{path} has not once each of the lines {BEGIN} and {END}, between which the tables go"
        )
    head, rest = content.split(BEGIN)
    write(path, f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


@screens()
def main(arguments: list[str] | None = None) -> int:
    text = "Published tables with our figures; curves."
    parser = argparse.ArgumentParser(prog="python -m fastkd.report", description=text, allow_abbrev=False)
    parser.add_argument(
        "folders",
        nargs="+",
        type=as_path,
        metavar="FOLDER",
        help="an --output of train.py, or a copy of its tables and logs",
    )
    parser.add_argument(
        "--plot", type=as_path, metavar="FILE", help="draw the curves of the runs there (PNG, SVG, PDF)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="runs with that value only, such as dataset=cifar10",
    )
    parser.add_argument(
        "--into",
        type=as_path,
        metavar="FILE",
        help=f"write the tables into this Markdown file, between {BEGIN} and {END}",
    )
    flags = parser.parse_args(arguments)
    try:
        wanted = [part.partition("=") for part in flags.only]
        rows = read(flags.folders)
        check_wanted(
            wanted,
            [*rows, *(curve.about for curve in curves.read(flags.folders, {}))] if flags.plot else rows,
        )
        rows = [row for row in rows if all((row.get(name) or "") == value for name, _, value in wanted)]
        if flags.into:
            put(flags.into, markdown(rows))
        else:
            print(
                "\n\n".join(
                    [f"{caption}\n\n{plain(heads, lines)}" for caption, heads, lines in tables(rows)]
                    + [NOTES]
                )
            )
            delivered()
        if flags.plot:
            curves.plot(flags.folders, {name: value for name, _, value in wanted}, flags.plot)
    except UserError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0
