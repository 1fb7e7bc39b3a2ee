"""The published tables with our figures beside them, and the means over seeds.

A run counts beside a published figure if data set, student, teacher, method and recipe agree and no field of
the recipe was changed, the batch being that of all processes together; with other ``--epochs`` it has a line
of its own that says so, and no difference.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.methods import title_of
from fastkd.models import create_model
from fastkd.report.published import MEANINGS, NOTE, TABLES, Entry, Published
from fastkd.training import by_option, results
from fastkd.training.groups import Group, changes, groups, mean_and_spread, number
from fastkd.training.recipes import RECIPES

DASH = "–"


def read(folders: Sequence[Path]) -> list[dict[str, str]]:
    """The rows of the tables in all ``folders``. Raises UserError for a missing folder or a foreign table."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    return [row for folder in folders for row in results.read_rows(folder)[1]]


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
    """(caption, heads, rows of cells) of every published table, with what its figures mean, and of our own
    means; of runs on other data sets than those tables have, our means alone.
    """
    found, made = groups(rows), []
    shown = TABLES if concerned(rows) else ()
    for table in shown:
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
        caption = f"{table.title} ({table.source}; {RECIPES[table.recipe].epochs} epochs)"
        made.append((caption, ["", "", *table.columns], lines))
    if shown:
        meant = [[m.source, m.figures, m.runs, m.spread, m.epoch] for m in MEANINGS]
        made.append(("What a published figure is", ["source", "figures", "runs", "spread", "epoch"], meant))
    if found:
        heads = "method dataset student teacher recipe epochs precision changed runs best reported".split()
        own = [[title_of(group.cells[0]), *group.cells[1:], *group.figures] for group in found]
        caption = (
            "All runs: test accuracy in percent, of the best epoch and of the one that the recipe reports"
        )
        made.append((caption, heads, own))
    return made


def concerned(rows: Sequence[dict[str, str]]) -> bool:
    """Whether there are published figures of a data set of the runs, or no runs."""
    return not rows or any(row.get("dataset") in table.dataset for row in rows for table in TABLES)


NOTES = (
    "Ours: mean ± sample standard deviation [seeds] (ours minus published), of the epoch that the recipe\n"
    "reports; – is not run; n/a is not published."
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
    parts = [NOTES] * concerned(rows)
    for caption, heads, lines in [*tables(rows), *by_option.tables(rows)]:
        parts += [f"**{caption}**", results.markdown(heads, lines).rstrip()]
    return "\n\n".join(parts)
