"""The report as one HTML file: tables, curves, accuracy by method and attention maps. It needs no network."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.io import figures
from fastkd.io.files import write
from fastkd.report import bars, curves
from fastkd.report.tables import NOTES, tables
from fastkd.training import by_option

NUMBER = re.compile(r"n/a|[-\d.,±+–− \[\]()]*")  # with its deviation, seeds and difference
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
nav a { margin-right: 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: 1rem 0 .4rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: calc(100vw - 2rem); }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
.number { text-align: right; }
.long { white-space: normal; min-width: 18rem; }
thead th { border-bottom: 2px solid #888; }
tr.ours td { font-weight: 600; }
figure { margin: 1rem 0; background: white; padding: .5rem; overflow-x: auto; }
figure img { max-width: 100%; min-width: 40rem; height: auto; display: block; }
figcaption { color: #333; font-size: .85rem; position: sticky; left: 0; }
"""


def save(
    path: Path, rows: Sequence[dict[str, str]], folders: Sequence[Path], wanted: Mapping[str, str]
) -> None:
    """Writes the page. ``rows``: of the table of results; ``wanted``: the values that the curves' runs must
    have. Raises UserError.
    """
    write(path, page(rows, folders, wanted))


def page(rows: Sequence[dict[str, str]], folders: Sequence[Path], wanted: Mapping[str, str]) -> str:
    made = tables(rows)
    published, own = made[:-1] if rows else made, made[-1:] if rows else []
    parts = {
        "runs": "".join(map(table, [*own, *by_option.tables(rows)])) or "<p>There are no finished runs.</p>",
        "accuracy by method": drawn(
            lambda: bars.figure(rows),
            "accuracy of each method",
            "no two methods were run with the same data set, networks, recipe and length",
        ),
        "curves": drawn(
            lambda: curves.figure(folders, wanted),
            "accuracy and losses by epoch",
            "no run has a log of its epochs",
        ),
        "published figures": f"<p>{html.escape(NOTES)}</p>" + "".join(map(table, published))
        if published
        else "<p>None is known for these data sets.</p>",
        "attention maps": maps(folders, rows) or "<p>No run has sheets of attention maps.</p>",
    }
    anchors = {title: title.replace(" ", "-") for title in parts}
    links = "".join(f'<a href="#{anchors[title]}">{title}</a>' for title in parts)
    body = "".join(
        f'<h2 id="{anchors[title]}">{title.capitalize()}</h2>\n{part}\n' for title, part in parts.items()
    )
    where = html.escape(", ".join(folder.name or str(folder) for folder in folders))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastkd: {where}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>Runs in {where}</h1>\n<nav>{links}</nav>\n{body}</body></html>\n"
    )


def table(found: tuple[str, list[str], list[list[str]]]) -> str:
    caption, heads, lines = found
    numbers = [all(map(NUMBER.fullmatch, column)) for column in zip(*lines)]
    head = "".join(cell("th", text, right) for text, right in zip(heads, numbers or [False] * len(heads)))
    body = "".join(
        ('<tr class="ours">' if len(line) > 1 and line[1].startswith("ours") else "<tr>")
        + "".join(cell("td", text, right) for text, right in zip(line, numbers))
        + "</tr>\n"
        for line in lines
    )
    return (
        f'<div class="wide"><table><caption><span>{html.escape(caption)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def cell(tag: str, text: str, right: bool) -> str:
    """A cell of a table; columns of numbers stand right, long texts take several lines."""
    kind = "number" if right else "long" if len(text) > 40 else ""
    attributes = ' scope="col"' * (tag == "th") + f' class="{kind}"' * bool(kind)
    return f"<{tag}{attributes}>{html.escape(text)}</{tag}>"


def image(content: bytes, kind: str, caption: str = "", alternative: str = "") -> str:
    data = base64.b64encode(content).decode("ascii")
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    text = html.escape(alternative or caption)
    return f'<figure><img src="data:image/{kind};base64,{data}" alt="{text}">{below}</figure>\n'


def drawn(make: Any, alternative: str, otherwise: str) -> str:
    """The figure that ``make`` returns, as HTML with the text ``alternative``; or why there is none."""
    try:
        figures.figure_class()
    except ImportError:
        return "<p>Figures take matplotlib (pip install matplotlib).</p>"
    figure = make()
    if figure is None:
        return f"<p>There is no figure: {otherwise}.</p>"
    return image(figures.rendered(figure, "svg"), "svg+xml", alternative=alternative)


def maps(folders: Sequence[Path], rows: Sequence[Mapping[str, Any]]) -> str:
    """The first sheet of each run of ``rows`` that has some; the others are in the run's folder."""
    found = []
    for output in folders:
        for row in rows:
            folder = str(row.get("folder") or "")
            sheets = sorted((output / folder).glob("maps-*.png")) if folder else []
            if sheets:
                others = ", ".join(path.name for path in sheets[1:])
                caption = f"{folder}: {sheets[0].name}" + (f"; beside it: {others}" if others else "")
                found.append(image(sheets[0].read_bytes(), "png", caption))
    return "".join(found)
