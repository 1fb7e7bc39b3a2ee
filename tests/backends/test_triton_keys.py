"""What Triton calls a compiled kernel in its cache does not depend on the kernels before it. By Triton 3.6
alone it would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
KEYS = """
import gc, importlib, json
from triton.runtime.jit import JITFunction
from fastkd import kernels
from fastkd.kernels.common.keys import settle

for name in {*kernels.LAUNCHERS.values()}:
    importlib.import_module(f"fastkd.kernels.{name}")
functions = [x for x in gc.get_objects() if isinstance(x, JITFunction)]
mine = [x for x in functions if x.__name__.endswith("_kernel")]
mine.sort(key=lambda x: (x.__module__, x.__name__))
for order in (mine, mine[::-1]):
    for x in functions:  # as in a new process
        x.hash, x.used_global_vals = None, {}
    for x in order:
        settle(x)
    print(json.dumps({x.__name__: x.cache_key for x in mine}))
"""


def test_a_kernel_has_one_key_in_whatever_order_kernels_are_used() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KEYS], env=env, capture_output=True, text=True, check=True)
    one, other = map(json.loads, done.stdout.splitlines())
    assert len(one) > 9
    assert one == other
