"""Parts of benchmarks/gpu.py that are a line of Python, and what came of them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from speed.gpu_plan import Part
from speed.gpu_run import Run, execute


def python(name: str, code: str, seconds: float = 20, measures: bool = False) -> Part:
    return Part(name, (sys.executable, "-S", "-c", code), seconds, measures=measures)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").is_file() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu-summary.json").read_text())


def ran(out: Path, *arguments: Any, minutes: float = 1) -> dict[str, Any]:
    """The summary of a run; ``arguments``: of ``execute``."""
    with Run(out, minutes, rehearse=True) as run:
        execute(run, *arguments)
    return summary(out)
