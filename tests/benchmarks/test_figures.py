"""Figures go into files: what MPLBACKEND says of screens, or a notebook left there, loses none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# what Jupyter sets, known only where matplotlib-inline is installed; a name of nothing; one that needs a
# screen
BACKENDS = ("module://matplotlib_inline.backend_inline", "no-such-backend", "tkagg")
# everything but matplotlib is imported once, then a process for each picture and backend
WORKER = """
import json, os, runpy, sys, torch
from fastkd.training import attention_maps
from fastkd.report import command as report
root, speed, output, *backends = sys.argv[1:]

def sheet():
    maps = {"student": [torch.rand(1, 8, 8)] * 3}
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert attention_maps.sheet(images, ["x"], maps, "x", "x", "").startswith(b"\\x89PNG")
    import matplotlib
    # a user's own windows open as before
    assert os.environ["MPLBACKEND"] != "tkagg" or matplotlib.get_backend(auto_select=False) == "tkagg"

def curves():
    sys.stdout = open(os.devnull, "w")
    assert report.main([root + "/benchmarks/results/experiments", "--plot", output + "/curves.png"]) == 0

def times():
    sys.path.insert(0, root + "/benchmarks")
    sys.argv = ["report.py", speed]
    runpy.run_path(root + "/benchmarks/report.py", run_name="__main__")

found = {}
for work in (sheet, curves, times):
    for backend in backends if work is sheet else backends[1:2]:
        child = os.fork()
        if child == 0:
            os.environ["MPLBACKEND"] = backend
            work()
            os._exit(0)
        found[f"{work.__name__} {backend}"] = os.waitpid(child, 0)[1]
print(json.dumps(found))
"""


def test_no_picture_depends_on_the_screen_that_mplbackend_names(tmp_path):
    pytest.importorskip("matplotlib")
    speed = tmp_path / "speed.json"
    speed.write_bytes(next(ROOT.glob("benchmarks/results/intel-*/speed.json")).read_bytes())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for name in ("DISPLAY", "MPLBACKEND"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(ROOT), str(speed), str(tmp_path), *BACKENDS],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert not any(json.loads(done.stdout.splitlines()[-1]).values()), done.stdout + done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (
        tmp_path / "speed.svg"
    ).read_bytes()
