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
@pytest.mark.parametrize(
    "case",
    [
        "attention resnet50-64 bfloat16 channels_last",  # tensors that would take gigabytes
        "tests test_triton_rkd_gpu test_no_call_waits",
    ],
)
def test_what_was_compiled_once_is_found_the_second_time(tmp_path: Path, case: str) -> None:
    (line, *_, last), (again, *_, end) = ahead(tmp_path, case), ahead(tmp_path, case)
    made, there = (len([*tmp_path.rglob(name)]) for name in ("*.cubin", "__triton_launcher*.so"))
    assert all(case in x and x.endswith(" s") for x in (line, again)), (line, again)  # nothing failed
    assert made > 1 and there <= made and last.startswith(f"{made} kernels compiled, 0 found, "), last
    assert end.startswith(f"0 kernels compiled, {made} found, 0 launchers compiled, "), end
