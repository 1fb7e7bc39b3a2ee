"""What asks for a package of the extra ``interop`` has its mark, and is not skipped in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PACKAGES = ("timm", "torchvision", "accelerate", "lightning", "torchdistill")


def test_they_are_asked_for_by_fixtures_alone():
    asks = re.compile(rf"""(?:importorskip|find_spec)\(["'](?:{"|".join(PACKAGES)})\b""")
    found = [path.name for path in TESTS.rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))]
    assert not found
    assert "FASTKD_INTEROP=1 pytest -q -m interop" in (TESTS.parent / ".ci" / "run").read_text()


@pytest.mark.parametrize("wanted", ["", "1"])
def test_one_that_is_skipped_fails_where_that_is_asked_for(tmp_path, wanted):
    for name in PACKAGES:  # there, but not to be imported, as a torchvision of another torch
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('broken', name={name!r})\n")
    paths = [str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FASTKD_INTEROP": wanted}
    file = TESTS / "models" / "test_specs.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interop", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=variables, cwd=TESTS.parent, timeout=300
    )
    assert done.returncode == bool(wanted), done.stdout + done.stderr
    told = done.stdout.splitlines()[-1]
    assert (" skipped" in told) != bool(wanted) and " passed" not in told
    assert ("FASTKD_INTEROP is set, but this is skipped: " in done.stdout) == bool(wanted)


def test_where_one_is_missing_nothing_runs(request, monkeypatch):
    plugins = request.config.pluginmanager.get_plugins()
    conftest = next(x for x in plugins if getattr(x, "__file__", None) == str(TESTS / "conftest.py"))
    monkeypatch.setattr(conftest, "find_spec", lambda name: None if name == "timm" else name)
    monkeypatch.setenv("FASTKD_INTEROP", "1")
    with pytest.raises(pytest.UsageError, match="FASTKD_INTEROP is set, but timm cannot be imported"):
        conftest.pytest_configure(request.config)
    monkeypatch.delenv("FASTKD_INTEROP")
    conftest.pytest_configure(request.config)
