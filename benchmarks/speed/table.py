"""A run as one table: a line for each group and thread count, with the milliseconds of each row and their
ratios to the first compiled backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# (row, heading); what a row is compared with stands under "÷" in multiples of the backend's time
TIMES = (
    ("streaming floor", "floor"),
    ("eager, stock malloc", "stock"),
    ("eager", "eager"),
    ("torch.compile", "compile"),
)
# RepDistiller's form gets a line of its own, where these stand in the columns of the same name
BROADCAST = {"eager": "eager, broadcast", "torch.compile": "torch.compile, broadcast"}
YARDSTICKS = ("torch.mm 1024", "torch.mm 4096", "torch.bmm of the products", "torch.relu")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def backends(result: dict[str, Any]) -> list[str]:
    """The rows that are backends of fastkd, in the order they come."""
    known = {*(name for name, _ in TIMES), *BROADCAST.values(), *YARDSTICKS}
    names = dict.fromkeys(
        name for record in result["groups"] if "operation" in record for name in record["rows"]
    )
    return [name for name in names if name not in known]


def figure(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never in powers of ten."""
    if value is None:
        return ""
    for limit, places in ((9.995, 2), (99.95, 1)):
        if value < limit:
            return f"{value:.{places if value >= 0.1 or digits == 2 else 3}f}"
    return f"{value:.0f}"


def processors(record: dict[str, Any]) -> str:
    """The cell under "thr": the threads, or on a GPU the clock, of which it has several."""
    return str(record["threads"]) if record.get("device", "cpu") == "cpu" else f"GPU, {record['clock']}"


def grid(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of losses."""
    ours = backends(result)
    heads = ["loss", "shape", "dtype", "layout", "pass", "thr", *(heading for _, heading in TIMES), *ours]
    heads += [f"÷{heading}" for _, heading in TIMES[1:]] + ["×floor", "GF/s", "of mm", "extra MB", "error"]
    rows = []
    for record in result["groups"]:
        if "operation" in record:
            rows.append(_cells(record, record["rows"], ours))
            if any(name in record["rows"] for name in BROADCAST.values()):
                main = {name: record["rows"][name] for name in ours if name in record["rows"]}
                other = {column: record["rows"].get(name, {}) for column, name in BROADCAST.items()}
                rows.append(_cells({**record, "operation": "fsp_broadcast"}, {**other, **main}, ours))
    used = [i for i in range(len(heads)) if i < 6 or any(row[i] for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in rows]


def _cells(record: dict[str, Any], rows: dict[str, dict[str, Any]], ours: list[str]) -> list[str]:
    """One line."""
    times = {name: row.get("milliseconds") for name, row in rows.items()}
    main = next((name for name in ours if times.get(name)), None)
    facts = rows[main] if main else {}
    base = facts.get("milliseconds")
    passes = (
        "fwd"
        if record["direction"] == "forward"
        else "fwd+bwd" + ("" if record["upstream"] == 1 else f" ×{record['upstream']}")
    )
    loss = {"attention": "AT", "fsp": "FSP", "fsp_broadcast": "FSP broadcast"}.get(
        record["operation"], record["operation"]
    )
    layout = "cl" if record["layout"] == "channels_last" else record["layout"]
    dtype = DTYPES.get(record["dtype"], record["dtype"]) + (" tf32" if record.get("matmul") == "tf32" else "")
    cells = [loss, record["shape"], dtype, layout, passes, processors(record)]
    names = [name for name, _ in TIMES] + ours
    cells += ["WRONG" if rows.get(name, {}).get("failed") else figure(times.get(name)) for name in names]
    for name, _ in TIMES[1:]:
        cells.append(figure(times[name] / base, 2) if base and times.get(name) else "")
    share = facts.get("of_streaming_bandwidth")
    cells += [figure(1 / share, 2) if share else "", figure(facts.get("gflop_per_s"))]
    cells.append(f"{facts['of_mm_rate']:.0%}" if "of_mm_rate" in facts else "")
    cells.append(f"{facts['extra_memory'] / 1e6:.2f}" if "extra_memory" in facts else "")
    cells.append(f"{max(facts['error'].values()):.0e}" if "error" in facts else "")
    return cells


def steps(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of whole training steps, in images a second."""
    records = [record for record in result["groups"] if "step" in record]
    names = list(dict.fromkeys(name for record in records for name in record["rows"]))
    rows = []
    for record in records:
        speeds = [record["rows"].get(name, {}).get("images_per_second") for name in names]
        rows.append(
            [
                record["step"],
                record["precision"],
                processors(record),
                *(f"{v:.0f}" if v else "-" for v in speeds),
            ]
        )
    return ["step, images/s", "precision", "thr", *names], rows


def loops(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of training loops: images a second, multiples of the toolkit's."""
    rows = []
    for record in (record for record in result["groups"] if "loop" in record):
        speeds = {
            name: row["images_per_second"]
            for name, row in record["rows"].items()
            if row.get("images_per_second")
        }
        base = next((speeds[name] for name in speeds if name.startswith("toolkit")), None)
        for name, speed in speeds.items():
            share = record["rows"].get(f"distillation loss in {name}", {}).get("milliseconds")
            share = f"{share / record['rows'][name]['milliseconds']:.1%}" if share else ""
            rows.append(
                [
                    record["loop"],
                    record["shape"],
                    name,
                    f"{speed:.0f}",
                    figure(speed / base, 2) if base else "",
                    share,
                ]
            )
    return ["loop", "teacher > student", "row", "images/s", "÷ toolkit", "loss"], rows


def methods(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of the other methods' losses and steps, beside their published form.

    On a GPU there is a row of ours for each backend: "fastkd, triton" has its ratio under "÷ fastkd, triton".
    Columns that are empty in every row are left out.
    """
    records = [record for record in result["groups"] if "method" in record]
    names = dict.fromkeys(name for record in records for name in record["rows"])
    ours = [name for name in names if name != "published"]
    every = ["published", *ours]
    heads = ["method", "case", "thr", *every, *("÷" if name == "fastkd" else f"÷ {name}" for name in ours)]
    heads += [*(f"{name} MB" for name in every), "error"]
    rows = []
    for record in records:
        found = {name: record["rows"].get(name, {}) for name in every}
        times = {name: row.get("milliseconds") for name, row in found.items()}
        cells = [record["method"], record["case"], processors(record)]
        cells += ["WRONG" if found[name].get("failed") else figure(times[name]) for name in every]
        base = times["published"]
        cells += [figure(base / times[name], 2) if base and times[name] else "" for name in ours]
        memory = [row.get("extra_memory") for row in found.values()]
        cells += ["" if size is None else f"{size / 1e6:.1f}" for size in memory]
        errors = [max(found[name]["error"].values()) for name in ours if "error" in found[name]]
        rows.append([*cells, f"{max(errors):.0e}" if errors else ""])
    used = [i for i in range(len(heads)) if i < 3 or any(row[i] for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in rows]


def text(heads: Sequence[str], rows: list[list[str]], left: int) -> list[str]:
    """Columns aligned for a terminal, the first ``left`` of them to the left."""
    widths = [max(len(row[i]) for row in [list(heads), *rows]) for i in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [list(heads), *rows]
    ]


def ran_on(result: dict[str, Any]) -> str:
    """What it ran on: the GPU, if there was one, the CPU and its cores."""
    named = [result[key] for key in ("gpu", "device") if key in result]
    return f"{'; '.join(named)}, {result['machine']['cores']} cores"


def heading(result: dict[str, Any]) -> str:
    """What ran it, in a line."""
    versions = result["versions"]
    return (
        f"{ran_on(result)}, torch {versions['torch']}, "
        f"fastkd {versions['fastkd']} ({result['cpu_path']}), {result['date']}"
    )


def ratios(heads: list[str], rows: list[list[str]], left: int) -> tuple[list[str], list[list[str]]]:
    """Of a table, the first ``left`` columns and those that hold multiples of the first backend's time."""
    kept = [i for i, head in enumerate(heads) if i < left or head.startswith(("÷", "×"))]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def ratio_lines(result: dict[str, Any]) -> list[str]:
    """The tables of losses and methods without a time: what may be said of a busy machine."""
    out = [heading(result), ""]
    for left, (heads, rows) in ((6, grid(result)), (3, methods(result))):
        if rows:
            out += [*text(*ratios(heads, rows, left), left - 1), ""]
    return out


def lines(result: dict[str, Any]) -> list[str]:
    """The tables, with what ran them above."""
    out = [
        heading(result),
        (
            "medians of interleaved rounds in milliseconds; 1 thread: process time, more: wall time; ÷:"
            " multiples of the first backend's time; ×floor: time for each byte moved ÷ that of the plain add"
        ),
        "",
    ]
    heads, rows = grid(result)
    if rows:
        out += text(heads, rows, 5)
    heads, rows = steps(result)
    if rows:
        out += ["", *text(heads, rows, 2)]
    heads, rows = loops(result)
    if rows:
        out += ["", *text(heads, rows, 3)]
    heads, rows = methods(result)
    if rows:
        out += ["", *text(heads, rows, 2)]
    return out
