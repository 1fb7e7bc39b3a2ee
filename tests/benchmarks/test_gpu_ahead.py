"""benchmarks/speed/gpu_ahead.py: kernels compiled without a GPU are found the next time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia.driver")
ROOT = Path(__file__).resolve().parents[2]


def ahead(cache: Path, word: str) -> list[str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "speed.gpu_ahead", "90", word]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_what_was_compiled_once_is_found_the_second_time(tmp_path: Path) -> None:
    """Of a shape whose tensors would take gigabytes."""
    case = "attention resnet50-64 bfloat16 channels_last"
    for told in ("2 compiled, 0 found", "0 compiled, 2 found"):
        (line, last) = ahead(tmp_path, case)
        assert case in line and told in line and line.endswith(" s"), line
    assert last.startswith("0 kernels compiled, 2 found, 0 launchers compiled")
    assert len([*tmp_path.rglob("*.cubin")]) == 2
