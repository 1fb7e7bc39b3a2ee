"""fastkd imported in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import child_process
import pytest

import fastkd
from fastkd import native

PACKAGE = Path(fastkd.__file__).parent
OPERATION = (
    "fastkd.attention_transfer_loss(torch.ones(1, 2, 3, requires_grad=True), torch.rand(1, 2, 3)).backward()"
)
needs_cpu_library = pytest.mark.skipif(not native.CPU.available, reason=native.CPU.reason)


def python(
    code: str, package: Path = PACKAGE, new: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs code where ``fastkd`` is the given folder; ``new``: where PyTorch is not imported yet either."""
    variables: dict[str, str | None] = {
        **{name: None for name in os.environ if name.startswith("FASTKD_")},
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
        "PYTHONPATH": str(package.parent),
        **environment,
    }
    if not new:
        return child_process.python(code, cwd=package.parent, **variables)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in {**os.environ, **variables}.items() if value is not None},
        cwd=package.parent,
        text=True,
        capture_output=True,
        timeout=300,
    )


def output(code: str, package: Path = PACKAGE, new: bool = False, **environment: str) -> str:
    done = python(code, package, new, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
