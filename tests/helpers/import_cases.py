"""fastkd imported in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastkd
from fastkd import native

PACKAGE = Path(fastkd.__file__).parent
OPERATION = (
    "fastkd.attention_transfer_loss(torch.ones(1, 2, 3, requires_grad=True), torch.rand(1, 2, 3)).backward()"
)
needs_cpu_library = pytest.mark.skipif(not native.CPU.available, reason=native.CPU.reason)


def python(code: str, package: Path = PACKAGE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter whose ``fastkd`` is the given folder."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FASTKD_")}
    variables |= {"PYTHONPATH": str(package.parent), **environment}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(
        command, env=variables, cwd=package.parent, text=True, capture_output=True, timeout=300
    )


def output(code: str, package: Path = PACKAGE, **environment: str) -> str:
    done = python(code, package, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
