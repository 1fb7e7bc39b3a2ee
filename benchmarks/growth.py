"""How CRD's and RKD's losses grow with the bank N, the negatives K and the batch B:
python benchmarks/growth.py [--full] [--output DIR]

Loss and gradient in float32 on one thread, milliseconds of processor time, the least of several rounds;
extra memory by PyTorch's own count. Along each axis the other sizes stay; the exponent is that of the power
of the size which fits best, by least squares of the logarithms. ``--full``: banks of up to 1,281,167 rows and
batches of up to 1024 (6 GB of memory, minutes). ``--output``: growth.json, growth.md and growth.svg are
written there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from speed.machine import facts  # noqa: E402
from speed.measure import peak_memory  # noqa: E402
from speed.methods import Draw, crd, rkd  # noqa: E402

from fastkd.io.figures import rendered, wanted  # noqa: E402
from fastkd.io.files import write  # noqa: E402

ROUNDS = 4
NAMES = {"size": "N", "k": "K", "batch": "B", "width": "D"}
# (loss, what stays, what varies: a few values, further ones for --full)
AXES: tuple[tuple[Callable[..., Any], dict[str, int], str, tuple[int, ...], tuple[int, ...]], ...] = (
    (crd, {"k": 4096, "batch": 64}, "size", (12_500, 25_000, 50_000), (200_000, 1_281_167)),
    (crd, {"size": 50_000, "batch": 64}, "k", (1024, 2048, 4096), (8192, 16_384)),
    (crd, {"size": 50_000, "k": 4096}, "batch", (16, 32, 64), (256, 1024)),
    (rkd, {"width": 64}, "batch", (32, 64, 128), (256, 512, 1024)),
    (rkd, {"batch": 128}, "width", (64, 128, 256), (512, 1024)),
)


def measure(make: Callable[..., Any], sizes: dict[str, int]) -> dict[str, float]:
    problem = make(Draw(torch.float32), **sizes)

    def both() -> None:
        for x in problem.leaves:
            x.grad = None
        problem.fastkd().backward()

    both()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        both()
        seconds.append(time.process_time() - begin)
    return {"milliseconds": 1e3 * min(seconds), "megabytes": peak_memory(both) / 1e6}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the a * size^b that is nearest to the values, by least squares of the logarithms."""
    x, y = ([math.log(v) for v in column] for column in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def rows_of(full: bool) -> list[dict[str, Any]]:
    rows = []
    for make, fixed, axis, few, more in AXES:
        points = few + more * full
        found = [measure(make, {**fixed, axis: value}) for value in points]
        row: dict[str, Any] = {
            "loss": make.__name__,
            "axis": NAMES[axis],
            "fixed": {NAMES[name]: value for name, value in fixed.items()},
            "sizes": points,
        }
        for unit in ("milliseconds", "megabytes"):
            values = [point[unit] for point in found]
            row |= {unit: values, f"{unit}_exponent": exponent(points, values)}
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    fixed = ", ".join(f"{name} {value}" for name, value in row["fixed"].items())
    points = "; ".join(
        f"{size}: {ms:.3g} ms, {mb:.3g} MB"
        for size, ms, mb in zip(row["sizes"], row["milliseconds"], row["megabytes"])
    )
    powers = f"{row['milliseconds_exponent']:.2f} | {row['megabytes_exponent']:.2f}"
    return f"| {row['loss']} | {row['axis']} ({fixed}) | {points} | {powers} |"


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    head = "| loss | against | found | time's power | memory's power |\n|---|---|---|---|---|"
    told = f"{machine['device']}, PyTorch {machine['versions']['torch']}, {machine['date'][:10]}"
    return "\n".join([f"One thread in processor time, float32. {told}.", "", head, *map(line, rows), ""])


def figure(rows: list[dict[str, Any]]) -> Any:
    found = wanted("--output")(figsize=(9, 4), layout="constrained")
    for axes, unit in zip(found.subplots(1, 2), ("milliseconds", "megabytes")):
        for row in rows:
            label = f"{row['loss']}, {row['axis']}: power {row[f'{unit}_exponent']:.2f}"
            axes.loglog(row["sizes"], row[unit], marker="o", label=label)
        axes.set(xlabel="size", ylabel=unit)
        axes.legend(fontsize="small")
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="larger banks and batches too")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where growth.json, .md and .svg go")
    flags = parser.parse_args(words)
    torch.set_num_threads(1)
    picture = wanted("--output") if flags.output else None
    rows = rows_of(flags.full)
    if picture is None:
        return 0
    machine = facts(sys.argv)
    flags.output.mkdir(parents=True, exist_ok=True)
    write(flags.output / "growth.json", json.dumps({"machine": machine, "rows": rows}, indent=1).encode())
    write(flags.output / "growth.md", table(rows, machine).encode())
    write(flags.output / "growth.svg", rendered(figure(rows), "svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
