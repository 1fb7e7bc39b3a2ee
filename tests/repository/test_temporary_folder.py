"""tests/helpers/temporary_folder.py: a run of the tests leaves nothing among the system's temporary files."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import temporary_folder

LEAVES = """
import os, subprocess, sys, tempfile

def test_it(tmp_path):
    place = tempfile.mkdtemp()
    subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"], check=True)
    left = os.listdir(os.path.dirname(place))
    assert len(left) == 3
    headers = next(name for name in left if name.startswith("torchinductor_"))
    assert os.listdir(os.path.join(os.path.dirname(place), headers)) == ["precompiled_headers"]
    assert os.path.dirname(place) not in str(tmp_path)
    assert os.path.dirname(place) not in os.environ["TORCHINDUCTOR_CACHE_DIR"]
    print(place)
"""


def test_what_is_left_goes_with_the_run(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    headers = Path(temporary_folder.compiled_in(str(temporary)), "precompiled_headers")
    headers.mkdir(parents=True)
    (tmp_path / "test_leaves.py").write_text(LEAVES)
    variables = {
        **os.environ,
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(Path(temporary_folder.__file__).parent),
    }
    for name in ("PYTEST_DEBUG_TEMPROOT", "TORCHINDUCTOR_CACHE_DIR"):
        variables.pop(name, None)
    plugins = ["-p", "temporary_folder", "-p", "no:xdist", "-p", "no:cacheprovider", "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", "-q", "-s", *plugins, str(tmp_path / "test_leaves.py")]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(temporary / temporary_folder.PREFIX) in done.stdout
    # pytest's folders of the last runs
    assert sorted(path.name.split("-")[0] for path in temporary.iterdir()) == ["pytest", headers.parent.name]
    assert headers.is_dir()


def test_these_tests_have_such_a_folder() -> None:
    assert Path(tempfile.gettempdir()).name.startswith(temporary_folder.PREFIX)
    assert os.environ["TMPDIR"] == tempfile.gettempdir()
