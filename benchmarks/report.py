"""A Markdown table and a plot from the results of ``pytest --benchmark``.

    python benchmarks/report.py                 of the newest results: speed.md, speed.svg beside speed.json
    python benchmarks/report.py FILE --readme   of FILE; its short table and plot go into README too, and the
                                                short table of the newest results of a GPU beside it
    python benchmarks/report.py --docs          the methods' table and figure of docs/speed.md

Prints `written: FILE` for each file that it writes. The plot needs matplotlib (the extra `dev`).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from speed import figure, quiet, readme, table, verdicts
from speed.readme import BARS, NAMES, markdown, origin, shown

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
COLOURS = ("#2a6fbb", "#76b900", "#8e44ad")


def newest(folder: Path = ROOT / "benchmarks" / "results", device: str = "cpu") -> Path | None:
    """The newest results with groups of a device, whatever else is in them."""
    read = {path: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/speed.json")}
    found = {path: result["date"] for path, result in read.items() if readme.of(result, device)}
    return max(found, key=found.__getitem__, default=None)


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
    lines += ["×floor: the time for each byte moved ÷ that of the plain add (floor).", ""]
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
            "the inputs, gradients included.",
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
        lines += [
            "Goals: geometric means over the shapes. Those of the other methods (published ÷ fastkd), and",
            "those that name one thread, are of one thread in process time; the rest of a CPU are of all",
            "threads in wall time.",
            "",
        ]
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
    print(f"written: {target}")


def path_of(text: str) -> Path:
    """A path as people write it: no shell expands the ``~`` of ``--readme=~/README.md``."""
    return Path(os.path.expanduser(text))


def write(path: Path, text: str) -> None:
    """The file, whole, and a line about it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    print(f"written: {path}")


def between_markers(page: Path, lines: list[str]) -> None:
    """Replace what stands between the markers."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no {BEGIN} ... {END} to write between")
    write(page, "\n".join([before + BEGIN, *lines, END]) + after)


def into_readme(page: Path, source: Path, result: dict[str, Any]) -> None:
    """The tables of a CPU, from ``source``, and of a GPU, from the newest results that lie beside it."""
    if not readme.of(result, "cpu"):
        raise SystemExit(f"{source} has no groups of a CPU, wanted those of pytest --benchmark")
    linked = {"of a CPU": source}
    lines = [
        origin(result),
        "Float32, NCHW, forward and backward, all threads, medians in milliseconds:",
        "",
        *readme.cpu(result),
        "",
    ]
    if source.with_suffix(".svg").exists():
        lines += [f"![Times of the losses]({_seen_from(page, source.with_suffix('.svg'))})", ""]
    other = newest(source.parent.parent, "cuda")
    on_gpu = json.loads(other.read_text(encoding="utf-8")) if other else {"groups": []}
    if other and not quiet.why_not_judged(on_gpu):
        linked["of a GPU"] = other
        lines += [
            origin(on_gpu),
            "Float32, NCHW, forward and backward, medians in milliseconds:",
            "",
            *readme.gpu(on_gpu),
            "",
        ]
    found = [f"[{what}]({_seen_from(page, path.with_suffix('.md'))})" for what, path in linked.items()]
    between_markers(page, [*lines, f"All of it: {', '.join(found)}."])


def _seen_from(page: Path, path: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def into_docs(page: Path, result: dict[str, Any], with_figure: bool) -> None:
    """The methods' table between the markers, and their figure beside the page."""
    found = figure.lines(result)
    if not found:
        raise SystemExit("no loss was measured on one thread: run pytest --benchmark first, or name a file")
    picture = page.with_suffix(".svg")
    if with_figure:
        figure.draw(found, picture)
        print(f"written: {picture}")
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
        "file", nargs="?", type=path_of, help="a speed.json; the newest under benchmarks/results by default"
    )
    parser.add_argument(
        "--readme",
        nargs="?",
        const=ROOT / "README.md",
        type=path_of,
        help="write the short table into README.md",
    )
    parser.add_argument(
        "--docs",
        nargs="?",
        const=ROOT / "docs" / "speed.md",
        type=path_of,
        help="write the methods' table into docs/speed.md, and speed.svg beside it, and nothing else",
    )
    parser.add_argument("--no-plot", action="store_true", help="tables only")
    options = parser.parse_args(arguments)
    source = options.file or newest()
    if source is None:
        raise SystemExit("no benchmarks/results/*/speed.json: run pytest --benchmark first, or name a file")
    source = source.resolve()
    result = json.loads(source.read_text(encoding="utf-8"))
    if options.docs:
        into_docs(options.docs.resolve(), result, not options.no_plot)
        return
    write(source.with_suffix(".md"), full(result))
    if why := quiet.why_not_judged(result):
        print(f"a table of ratios only, neither plot nor README: {why}")
        return
    if not options.no_plot:
        plot(result, source.with_suffix(".svg"))
    if options.readme:
        into_readme(options.readme.resolve(), source, result)


if __name__ == "__main__":
    main()
