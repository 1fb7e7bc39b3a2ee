"""The steps of docs/adding.md, in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from support_data import small_digits
from train import main
small_digits()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_method_is_added_by_the_files_that_the_page_shows(tmp_path):
    text = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))
    assert list(files) == ["fastkd/methods/vector.py", "tests/methods/test_vector.py"]
    for folder in ("fastkd", "tests", "benchmarks"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results")
        )
    for path in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / path, tmp_path)
    for library in (ROOT / "fastkd").glob("_C*.so"):
        (tmp_path / "fastkd" / library.name).symlink_to(library)
    for path, code in files.items():
        (tmp_path / path).write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "tests" / "helpers")])

    def run(*command):
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "1 passed" in run("-m", "pytest", "-q", "tests/methods/test_vector.py")
    networks = ["--teacher", "resnet8", "--student", "resnet8"]
    flags = [
        "--method",
        "kd+vector",
        "--dataset",
        "digits",
        "--option",
        "beta=5",
        "--epochs",
        "1",
        "--no-pictures",
        *networks,
    ]
    shown = run("-c", RUN, *flags)
    assert "method   vector+kd: 1 epoch of ce + vector + kd" in shown and "vector.beta=5.0" in shown
    rows = (tmp_path / "runs" / "results.csv").read_text().splitlines()
    assert (
        ",vector+kd,digits," not in rows[1] and "vector+kd,digits" in rows[2] and "vector.beta=5.0" in rows[2]
    )
