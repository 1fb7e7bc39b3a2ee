"""``python -m fastkd.report``: what is printed, drawn and written of finished runs.

python -m fastkd.report runs                              prints the tables
python -m fastkd.report runs --plot curves.png            and draws the curves of the runs
python -m fastkd.report runs --bars methods.png           and the accuracy of each method
python -m fastkd.report runs --html report.html           all of it as one page, with attention maps
python -m fastkd.report runs --into README.md             writes the tables between its markers instead
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.io.arguments import OneLineParser
from fastkd.io.console import delivered, screens
from fastkd.io.files import as_path, write
from fastkd.report import bars, curves, page
from fastkd.report.tables import NOTES, concerned, markdown, plain, read, tables
from fastkd.training import by_option

BEGIN, END = "<!-- experiments:begin -->", "<!-- experiments:end -->"


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
    parser = OneLineParser(prog="python -m fastkd.report", description=text, allow_abbrev=False)
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
    parser.add_argument("--bars", type=as_path, metavar="FILE", help="draw the accuracy of each method there")
    parser.add_argument(
        "--html", type=as_path, metavar="FILE", help="write tables, curves and maps there as one page"
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
        values = {name: value for name, _, value in wanted}
        rows = [row for row in rows if all((row.get(name) or "") == values[name] for name in values)]
        if flags.into:
            put(flags.into, markdown(rows))
            print(f"written: {flags.into}")
        else:
            made = [*tables(rows), *by_option.tables(rows)]
            parts = [f"{caption}\n\n{plain(heads, lines)}" for caption, heads, lines in made]
            print("\n\n".join(parts + [NOTES] * concerned(rows)))
            delivered()
        separator = "" if flags.into else "\n"  # the tables stand above
        for path, make in (
            (flags.plot, lambda path: curves.plot(flags.folders, values, path)),
            (flags.bars, lambda path: bars.plot(rows, path)),
            (flags.html, lambda path: page.save(path, rows, flags.folders, values)),
        ):
            if path:
                make(path)
                print(f"{separator}written: {path}")
                separator = ""
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
