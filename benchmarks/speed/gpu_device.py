"""Where the parts of benchmarks/gpu.py run, how they are timed, and where they write."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REHEARSAL = os.environ.get("FASTKD_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
Features = list[torch.Tensor]


def save(name: str, value: Any) -> None:
    folder = Path(os.environ.get("FASTKD_GPU_OUT", "."))
    temporary = folder / f".{name}.tmp"
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{name}.json")


def wait() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], rounds: int = 7, calls: int = 10) -> float:
    """The median over rounds of several calls."""
    call()
    readings = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        readings.append((time.perf_counter() - begun) / calls)
    return sorted(readings)[rounds // 2]
