"""What of the speed results gpu-summary.json has: the figures that are looked at first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOLD = ("milliseconds", "images_per_second", "speedup over ", "over ", "failed")  # of a row, or begins so
# of a group, what its name in the summary is made of, where it has it
NAMED = (
    "operation",
    "shape",
    "method",
    "case",
    "step",
    "dtype",
    "precision",
    "layout",
    "matmul",
    "device",
    "clock",
)


def named(group: dict[str, Any]) -> str:
    """A group's name in the summary: no two groups of a run on a GPU have the same."""
    return " ".join(str(group[key]) for key in NAMED if key in group)


def speedups(staging: Path) -> Iterator[tuple[str, Any]]:
    """Of each measured row its milliseconds and images a second, and its ratios to others, or why it failed;
    of results that cannot be read, why.
    """
    for file in sorted(staging.glob("speed/*/speed.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            for group in found["groups"]:
                yield (
                    named(group),
                    {
                        row: {key: value for key, value in facts.items() if key.startswith(TOLD)}
                        for row, facts in group["rows"].items()
                    },
                )
        except Exception as error:  # the other parts' results are still to be packed
            yield file.parent.name, f"not read: {type(error).__name__}: {error}"
