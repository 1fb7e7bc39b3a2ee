"""A Markdown table and a plot from the results of ``pytest --benchmark``.

    python benchmarks/report.py                 of the newest results: speed.md, speed.svg beside speed.json
    python benchmarks/report.py FILE --readme   of FILE; the short table and the plot go into README too
    python benchmarks/report.py --docs          the methods' table and figure of docs/speed.md

The plot needs matplotlib (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from speed import figure, quiet, table, verdicts

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
NAMES = {"attention": "AT", "fsp": "FSP"}
# README's rows; of results that lack them, all
SHORT = {
    *(("attention", shape) for shape in ("resnet20-64", "wrn40_2-128", "resnet50-8")),
    *(("fsp", shape) for shape in ("resnet20-64", "wrn40_2-128")),
}
# (row, label, colour) of the bars
BARS = (
    ("eager, stock malloc", "eager, stock malloc", "#c9c9c9"),
    ("eager", "eager, malloc tuned", "#8f8f8f"),
    ("torch.compile", "torch.compile", "#e8a33d"),
)
COLOURS = ("#2a6fbb", "#76b900", "#8e44ad")


def newest(folder: Path = ROOT / "benchmarks" / "results") -> Path:
    """The newest results with groups of a CPU: those of a GPU alone are asked for by name."""
    read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*/speed.json")]
    of_cpu = [(path, r) for path, r in read if any(g.get("device", "cpu") == "cpu" for g in r["groups"])]
    found = {path: result["date"] for path, result in of_cpu}
    if not found:
        raise SystemExit("no benchmarks/results/*/speed.json: run pytest --benchmark first, or name a file")
    return max(found, key=found.__getitem__)


def markdown(heads: list[str], rows: list[list[str]], left: int) -> list[str]:
    rule = ["---" if i < left else "---:" for i in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def origin(result: dict[str, Any]) -> str:
    """One sentence on what was measured where."""
    versions, machine = result["versions"], result["machine"]
    flags = ", ".join(
        flag.replace("_", "-")
        for flag in machine["flags"]
        if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    )
    return (
        f"{table.ran_on(result)} ({flags or 'no vector flags known'}),"
        f" {machine['memory_gib']} GiB; PyTorch {versions['torch']}, fastkd {versions['fastkd']};"
        f" `{' '.join(result['command'])}`, {result['date'][:10]}."
    )


def shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the short table and the plot: float32, NCHW, forward and backward, all threads."""
    most = max((record["threads"] for record in result["groups"]), default=0)
    wanted = {
        "dtype": "float32",
        "layout": "nchw",
        "direction": "forward+backward",
        "upstream": 1,
        "threads": most,
        "clock": "wall",
    }
    records = [
        r
        for r in result["groups"]
        if all(r.get(key) == value for key, value in wanted.items()) and r["shape"] != "tiny-2"
    ]
    return [r for r in records if r.get("device", "cpu") == "cpu"]


def short(result: dict[str, Any]) -> list[str]:
    """README's table: milliseconds of the main rows, and the ratios to the first backend."""
    ours = table.backends(result)
    rows, records = [], shown(result)
    for record in [r for r in records if (r["operation"], r["shape"]) in SHORT] or records:
        times = {name: row.get("milliseconds") for name, row in record["rows"].items()}
        base = next((times[name] for name in ours if times.get(name)), None)
        cells = [NAMES.get(record["operation"], record["operation"]), record["shape"]]
        cells += [table.figure(times.get(row)) or "–" for row, _, _ in BARS] + [
            table.figure(times.get(name)) or "–" for name in ours
        ]
        rows.append(
            cells
            + [table.figure(times[row] / base, 2) if base and times.get(row) else "–" for row, _, _ in BARS]
        )
    heads = [
        "loss",
        "network-batch",
        *(label for _, label, _ in BARS),
        *ours,
        *(f"÷ {label}" for _, label, _ in BARS),
    ]
    return markdown(heads, rows, 2)


def full(result: dict[str, Any]) -> str:
    """speed.md."""
    why = quiet.why_not_judged(result)
    lines = ["# Speed", "", *([f"**{why}.**", ""] if why else []), origin(result), ""]
    if why:
        result = quiet.trusted(result)
        for left, (heads, rows) in ((6, table.grid(result)), (3, table.methods(result))):
            lines += [*markdown(*table.ratios(heads, rows, left), left - 1), ""] if rows else []
        return "\n".join(lines)
    lines += ["Medians of interleaved rounds in milliseconds. One thread: process time; more: wall time.", ""]
    heads, rows = table.grid(result)
    lines += [*markdown(heads, rows, 5), ""]
    heads, rows = table.steps(result)
    if rows:
        lines += [*markdown(heads, rows, 2), ""]
    heads, rows = table.loops(result)
    if rows:
        lines += [
            "Training loops, batch 128, data included, malloc as it comes; loss: the share of a step that",
            "the distillation loss and its gradient take.",
            "",
            *markdown(heads, rows, 3),
            "",
        ]
    heads, rows = table.methods(result)
    if rows:
        lines += [
            "Losses of the other methods, forward and backward, and whole steps, in float32, beside the",
            "published form. ÷: how many times faster. MB: the most that PyTorch's allocator held beyond",
            "the inputs.",
            "",
            *markdown(heads, rows, 2),
            "",
        ]
    found = verdicts.verdicts(result)
    if found:
        cells = []
        for v in found:
            spread = f"{min(v.values.values()):.2f} … {max(v.values.values()):.2f}"
            bound = f"{'≥' if v.goal.at_least else '≤'} {v.goal.bound:g} {v.goal.unit}".rstrip()
            falls = ", ".join(f"{name} {value:.2f}" for name, value in v.shortfalls.items())
            cells.append(
                [v.goal.title, f"{v.mean:.2f}", spread, bound, "yes" if v.reached else "**no**", falls]
            )
        lines += ["Goals: geometric means, all threads, wall time.", ""]
        lines += [*markdown(["goal", "mean", "from … to", "bound", "reached", "short of it"], cells, 1), ""]
    return "\n".join(lines)


def plot(result: dict[str, Any], target: Path) -> None:
    """Bars of each network, in multiples of the first backend's time."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, where it is unknown, would end the import
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install -e '.[dev]', or --no-plot") from None
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fastkd", "font.size": 9})
    from matplotlib import pyplot

    ours = table.backends(result)
    bars = [*BARS, *((name, f"fastkd {name}", colour) for name, colour in zip(ours, COLOURS))]
    operations = list(dict.fromkeys(record["operation"] for record in shown(result)))
    figure, axes = pyplot.subplots(1, max(len(operations), 1), figsize=(10, 3.4), squeeze=False)
    for axis, operation in zip(axes[0], operations):
        records = [record for record in shown(result) if record["operation"] == operation]
        for position, (row, label, colour) in enumerate(bars):
            heights = []
            for record in records:
                times = {name: entry.get("milliseconds") for name, entry in record["rows"].items()}
                base = next((times[name] for name in ours if times.get(name)), None)
                heights.append(times[row] / base if base and times.get(row) else 0)
            places = [i + (position - (len(bars) - 1) / 2) * 0.8 / len(bars) for i in range(len(records))]
            drawn = axis.bar(places, heights, 0.8 / len(bars), label=label, color=colour)
            axis.bar_label(drawn, [f"{height:.1f}" if height else "" for height in heights], fontsize=6)
        axis.set_xticks(range(len(records)), [record["shape"] for record in records], fontsize=7)
        axis.set_title(f"{NAMES.get(operation, operation)}, float32, forward + backward")
        axis.set_ylabel("time ÷ fastkd's")
        axis.spines[["top", "right"]].set_visible(False)
    if operations:
        figure.legend(
            *axes[0][0].get_legend_handles_labels(),
            loc="lower center",
            ncols=len(bars),
            fontsize=8,
            frameon=False,
        )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(target, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def written(text: str) -> Path:
    """A path as people write it: no shell expands the ``~`` of ``--readme=~/README.md``."""
    return Path(os.path.expanduser(text))


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def between_markers(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no {BEGIN} ... {END} to write between")
    write(page, "\n".join([before + BEGIN, *lines, END]) + after)


def into_docs(page: Path, result: dict[str, Any], with_figure: bool) -> None:
    """The methods' table between the markers, and their figure beside the page."""
    found = figure.lines(result)
    if not found:
        raise SystemExit("no loss was measured on one thread: run pytest --benchmark first, or name a file")
    picture = page.with_suffix(".svg")
    if with_figure:
        figure.draw(found, picture)
    why = quiet.why_not_judged(result)
    text = [
        origin(result),
        *([f"{why}."] if why else []),
        "",
        *markdown(*figure.cells(found, why is None), 2),
        "",
    ]
    between_markers(page, [*text, f"![Times faster than the published form]({picture.name})"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="A Markdown table and a plot from the results of pytest --benchmark."
    )
    parser.add_argument(
        "file", nargs="?", type=written, help="a speed.json; the newest under benchmarks/results by default"
    )
    parser.add_argument(
        "--readme",
        nargs="?",
        const=ROOT / "README.md",
        type=written,
        help="write the short table into README.md",
    )
    parser.add_argument(
        "--docs",
        nargs="?",
        const=ROOT / "docs" / "speed.md",
        type=written,
        help="write the methods' table into docs/speed.md, and speed.svg beside it, and nothing else",
    )
    parser.add_argument("--no-plot", action="store_true", help="tables only")
    options = parser.parse_args(arguments)
    source = (options.file or newest()).resolve()
    result = json.loads(source.read_text(encoding="utf-8"))
    if options.docs:
        into_docs(options.docs.resolve(), result, not options.no_plot)
        return
    write(source.with_suffix(".md"), full(result))
    if why := quiet.why_not_judged(result):
        print(f"a table of ratios only, neither plot nor README: {why}")
        return
    lines = [
        origin(result),
        "Float32, NCHW, forward and backward, all threads, medians in milliseconds:",
        "",
        *short(result),
        "",
    ]
    if not options.no_plot:
        plot(result, source.with_suffix(".svg"))
    if options.readme:
        readme = options.readme.resolve()
        links = {
            kind: Path(os.path.relpath(source.with_suffix(kind), readme.parent)).as_posix()
            for kind in (".svg", ".md")
        }
        if source.with_suffix(".svg").exists():
            lines += [f"![Times of the losses]({links['.svg']})", ""]
        lines += [f"All of it: [{source.stem}.md]({links['.md']})."]
        between_markers(readme, lines)


if __name__ == "__main__":
    main()
