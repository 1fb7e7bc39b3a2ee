"""The report as one HTML file: tables, curves, accuracy by method and attention maps. It needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.io import figures
from fastkd.io.files import write
from fastkd.report import bars, curves
from fastkd.report.tables import NOTES, tables
from fastkd.training import by_option

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
nav a { margin-right: 1.2rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: 1rem 0 .4rem; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; }
tr.ours td { font-weight: 600; }
figure { margin: 1rem 0; background: white; padding: .5rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #333; font-size: .85rem; }
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
        "accuracy by method": drawn(lambda: bars.figure(rows), "no two methods were run alike"),
        "curves": drawn(lambda: curves.figure(folders, wanted), "no run has a log of its epochs"),
        "published figures": f"<p>{html.escape(NOTES)}</p>" + "".join(map(table, published))
        if published
        else "<p>There are none of these data sets.</p>",
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
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(
        ('<tr class="ours">' if len(line) > 1 and line[1].startswith("ours") else "<tr>")
        + "".join(f"<td>{html.escape(text)}</td>" for text in line)
        + "</tr>\n"
        for line in lines
    )
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )


def image(content: bytes, kind: str, caption: str) -> str:
    data, text = base64.b64encode(content).decode("ascii"), html.escape(caption)
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def drawn(make: Any, otherwise: str) -> str:
    """A figure that ``make`` returns, or one line that says why there is none."""
    try:
        figures.figure_class()
    except ImportError:
        return "<p>Figures take matplotlib (pip install matplotlib).</p>"
    figure = make()
    if figure is None:
        return f"<p>There is none: {otherwise}.</p>"
    return image(figures.rendered(figure, "svg"), "svg+xml", "")


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
