"""Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton does not interpret."""
    env = {**os.environ, "TRITON_INTERPRET": "0", **env}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
