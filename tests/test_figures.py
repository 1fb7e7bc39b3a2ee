"""Figures go into files: what MPLBACKEND says of screens, or a notebook left there, loses none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, backend):
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("DISPLAY", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)


# what Jupyter sets, known only where matplotlib-inline is installed; a name of nothing; one that needs a screen
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-backend", "tkagg"])
def test_a_notebooks_backend_loses_no_picture(backend):
    pytest.importorskip("matplotlib")
    code = """
import io, os, sys, torch
from fastkd.training import pictures
maps = {"student": [torch.rand(1, 8, 8)] * 3}
assert pictures.sheet(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["x"], maps, "x", "x", "").startswith(b"\\x89PNG")
import matplotlib
print(os.environ["MPLBACKEND"], matplotlib.get_backend(auto_select=False))
"""
    done = python(code, backend)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert found[0] == backend and (backend != "tkagg" or found[1] == backend)  # a user's own windows open as before


def test_the_reports_draw_too(tmp_path):
    pytest.importorskip("matplotlib")
    experiments = ROOT / "benchmarks" / "results" / "experiments"
    speed = next(ROOT.glob("benchmarks/results/*/speed.json"))
    (tmp_path / "speed.json").write_bytes(speed.read_bytes())
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from fastkd.training import report
assert report.main([{str(experiments)!r}, "--plot", {str(tmp_path / "curves.png")!r}]) == 0
for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
    del sys.modules[name]
import runpy
sys.argv = ["report.py", {str(tmp_path / "speed.json")!r}]
runpy.run_path({str(ROOT / "benchmarks" / "report.py")!r}, run_name="__main__")
"""
    done = python(code, "no-such-backend")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (tmp_path / "speed.svg").read_bytes()
