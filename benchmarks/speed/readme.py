"""README's tables: the main rows of the newest results, of a CPU and of a GPU."""

from __future__ import annotations

from typing import Any

from speed import table

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
# README's rows of a GPU, and how each clock is called there; of results that lack them, all
GPU_SHORT = {
    (operation, *row)
    for operation in NAMES
    for row in (("resnet20-128", "wall"), ("resnet20-128", "graph"), ("resnet50-64", "cold"))
}
CLOCKS = {"wall": "wall clock", "graph": "CUDA graph", "cold": "CUDA graph, cold cache"}


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
    most = max((record["threads"] for record in of(result, "cpu")), default=0)
    return [r for r in losses(result, "cpu") if r["threads"] == most and r["clock"] == "wall"]


def losses(result: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The records of losses on a device: float32, NCHW, forward and backward."""
    wanted = {"dtype": "float32", "layout": "nchw", "direction": "forward+backward", "upstream": 1}
    return [
        r
        for r in of(result, device)
        if all(r.get(key) == value for key, value in wanted.items()) and r["shape"] != "tiny-2"
    ]


def of(result: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """The groups that were measured on a kind of device."""
    return [record for record in result["groups"] if record.get("device", "cpu") == device]


def cpu(result: dict[str, Any]) -> list[str]:
    """README's table of a CPU: milliseconds of the main rows, and the ratios to the first backend."""
    ours = table.backends({"groups": of(result, "cpu")})
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


def gpu(result: dict[str, Any]) -> list[str]:
    """README's table of a GPU: milliseconds of the main rows, and the ratios to each backend."""
    ours, compared = table.backends({"groups": of(result, "cuda")}), ("eager", "torch.compile")
    pairs = [(slow, name) for slow in compared for name in ours]
    records = [
        r for r in losses(result, "cuda") if r["clock"] in CLOCKS and r.get("matmul") in (None, "ieee")
    ]
    wanted = [r for r in records if (r["operation"], r["shape"], r["clock"]) in GPU_SHORT]
    rows = []
    for record in wanted or records:
        times = {name: row.get("milliseconds") for name, row in record["rows"].items()}
        cells = [
            NAMES.get(record["operation"], record["operation"]),
            record["shape"],
            CLOCKS[record["clock"]],
        ]
        cells += [table.figure(times.get(name)) or "–" for name in (*compared, *ours)]
        for slow, name in pairs:
            known = times.get(slow) and times.get(name)
            cells.append(table.figure(times[slow] / times[name], 2) if known else "–")
        rows.append(cells)
    heads = [
        "loss",
        "network-batch",
        "clock",
        *compared,
        *ours,
        *(f"{slow} ÷ {name}" for slow, name in pairs),
    ]
    return markdown(heads, rows, 3)
