"""The table of finished runs: results.csv, and its most important columns in results.md."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.io.files import locked, write
from fastkd.training.groups import KEYS, groups, number

COLUMNS = (
    "no", "method", "dataset", "student", "teacher", "start_time", "acc", "epoch", "nepoch", "lr",
    "batch_size", "last_acc", "seed", "recipe", "precision", "device", "seconds", "images_per_second",
    "fastkd", "processes", "reported_acc", "teacher_acc", "train_acc", "losses", "overrides", "teacher_seed",
    "deterministic", "compiled", "cuda_graph", "environment", "teacher_checkpoint", "student_checkpoint",
    "settled", "plugins", "folder",
)  # fmt: skip


READ = {
    **{name: name for name in ("no", "method", "dataset", "student", "teacher", "recipe")},
    "nepoch": "epochs", "seed": "seed", "acc": "best", "reported_acc": "reported", "overrides": "changed",
}  # fmt: skip
"""The columns of results.md, and what they are called there; the others are in results.csv."""
WIDTH = 120
NAMES = ("dataset", "student", "teacher", "method", "recipe")
"""What is shortened where a line is wider: no number ever is."""
NUMBERS = ("acc", "epoch", "nepoch", "lr", "batch_size", "last_acc", "seed", "reported_acc")


def read_rows(output: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of ``output``/results.csv; a file that is not there has no rows. Raises UserError for
    one that is something else.

    Whatever a spreadsheet makes of it is read too: see :func:`read_table`. Our columns come first.
    """
    path = output / "results.csv"
    columns, rows = read_table(path, COLUMNS[:11], COLUMNS)
    for row in rows:
        wrong = [name for name in NUMBERS if row.get(name) and number(row[name]) is None]
        if wrong:
            raise UserError(f"{path}, row {row['no']}: {wrong[0]} is {row[wrong[0]]!r}, wanted a number")
    return [*COLUMNS, *(name for name in columns if name not in COLUMNS)], rows


def read_table(
    path: Path, wanted: Sequence[str], whole: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a CSV file that has the columns ``wanted``, anywhere. One that is empty or not there
    has none.

    Commas, semicolons or tabs, either kind of quotation marks, any line ends, a byte order mark, empty lines
    and empty columns are read alike. Raises UserError for other columns, and for a line with more values than
    columns or without one of ``whole``: a comma too many or too few shifts the others.
    """
    text, lines = "", list[tuple[int, list[str]]]()
    try:
        text = path.read_text(encoding="utf-8-sig")
        for delimiter, quote in itertools.product(",;\t", "\"'"):
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, quotechar=quote)
            read = [
                (reader.line_num, [value.strip() for value in line])
                for line in reader
                if any(map(str.strip, line))
            ]
            if not read or set(wanted) <= set(read[0][1]):
                lines = lines or read
                if len({len(line) for _, line in read}) <= 1:  # a heading may have nothing to quote
                    lines = read
                    break
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not lines and text.strip():
        raise UserError(
            f"{path} has other columns than this command's: {text.strip().splitlines()[0][:40]} ..."
        )
    heads, rows = lines[0][1] if lines else [], []
    columns = [name for name in heads if name]
    if len(set(columns)) < len(columns):
        raise UserError(
            f"{path} has a column twice: {next(name for name in columns if columns.count(name) > 1)}"
        )
    for where, line in lines[1:]:
        row = dict(itertools.zip_longest(heads, line[: len(heads)], fillvalue=""))
        if any(line[len(heads) :]) or row.pop("", "") or not set(heads[len(line) :]).isdisjoint(whole):
            raise UserError(f"{path}, line {where}, is damaged: {len(line)} values, wanted {len(heads)}")
        rows.append(row)
    return columns, rows


def append(output: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Adds ``row`` under the next number and returns it with that; both tables stay whole if it is killed.

    Raises UserError when the tables cannot be read or written; the row is then in a file of its own beside
    them, until it is added.
    """
    aside = output / f"results-{row.get('folder', 'run')}.csv"
    try:
        with locked(output / ".results.lock"):
            for half in output.glob(".results.*.tmp"):  # of a process that was killed: nobody else writes now
                half.unlink(missing_ok=True)
            columns, rows = read_rows(output)
            row = {"no": len(rows) + 1, **row}
            write(output / "results.md", fitted_markdown(READ, [*rows, row]) + means([*rows, row]))
            # last: a run with a row here is finished
            write(output / "results.csv", table(columns, [*rows, row]))
    except UserError as error:
        try:
            write(aside, table(COLUMNS, [row]))
        except UserError:  # a full disk, a folder that is gone: the row can be made again from the checkpoint
            raise error from None
        raise UserError(
            f"{error}; the row of this run is kept in {aside}, and --resume adds it to the mended table"
        ) from None
    with suppress(OSError):
        aside.unlink()
    return row


def means(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds of each configuration, as a section in Markdown; nothing if all have one seed."""
    heads = {name: READ.get(name, name) for name in (*KEYS[:8], "seeds", "acc", "reported_acc")}
    several = [group for group in groups(rows) if len(group.rows) > 1]
    cells = ([*group.cells, " ".join(group.seeds), *group.figures[1:]] for group in several)
    lines = [dict(zip(heads, line, strict=True)) for line in cells]
    return (
        f"\n## Means over seeds\n\nMean ± sample standard deviation.\n\n{fitted_markdown(heads, lines)}"
        if lines
        else ""
    )


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of these cells."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [heads, *rows]]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:], ""])


def fitted_markdown(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as a Markdown table that reads well as it is: aligned, and at most 120 columns wide.

    ``columns``: their heads by name. Names are shortened for that, and before them the changes of a recipe.
    """
    lines = [list(columns.values())]
    lines += [[str(row.get(name, "")).replace("|", "\\|") for name in columns] for row in rows]
    widths = dict(zip(columns, [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)], strict=True))
    while sum(widths.values()) + 3 * len(widths) + 1 > WIDTH:
        cut = (
            "overrides"
            if widths.get("overrides", 0) > 12
            else max(NAMES, key=lambda name: widths.get(name, 0))
        )
        if widths.get(cut, 0) <= 3:
            break
        widths[cut] -= 1
    lines.insert(1, ["-" * width for width in widths.values()])
    shown = (
        [_shortened(*each) for each in zip(line, widths, widths.values(), strict=True)] for line in lines
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in shown)


def _shortened(cell: str, name: str, width: int) -> str:
    if len(cell) > width and name in NAMES[:3]:  # whose ends tell them apart
        cell = "…" + cell[1 - width :]
    elif len(cell) > width:
        cell = cell[: width - 1].rstrip("\\") + "…"
    return cell.ljust(width)
