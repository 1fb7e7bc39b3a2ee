"""Compiles every launcher's kernels with each release of Triton that fastkd supports, without a GPU.

    python tests/packaging/triton_releases.py            every release on the index from 3.6.0 on
    python tests/packaging/triton_releases.py 3.7.1      this one

Prints a line a release and fails if one fails. Needs PyTorch and pip; a release takes 200 MB and some
minutes. What is compiled is in tests/helpers/triton_compile.py: all its cases for sm_90, enough of them for
every kernel elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILE = ROOT / "tests" / "helpers" / "triton_compile.py"
OLDEST = (3, 6, 0)
CAPABILITIES = (80, 90, 100)


def releases() -> list[str]:
    """Those that pip finds for this interpreter, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "triton"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"Available versions: (.*)", said)
    assert found, said
    numbers = [tuple(map(int, version.split("."))) for version in found[1].split(", ")]
    return [".".join(map(str, number)) for number in sorted(numbers) if number >= OLDEST]


def compiled(site: Path, capability: int) -> tuple[list[dict], str]:
    """What triton_compile.py says of each kernel with the Triton in ``site``, or its last error line."""
    env = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    cases = [] if capability == 90 else ["few"]
    done = subprocess.run(
        [sys.executable, COMPILE, str(capability), *cases], env=env, capture_output=True, text=True
    )
    if done.returncode:
        error = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)
        return [], f"sm_{capability}: {error[-1] if error else done.stderr[-200:]}"
    return [kernel for case in json.loads(done.stdout) for kernel in case["kernels"]], ""


def check(version: str) -> str:
    """An error, or nothing; prints the release's line."""
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            folder,
            f"triton=={version}",
        ]
        done = subprocess.run(pip, capture_output=True, text=True)
        parts, error = [], "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
        for capability in CAPABILITIES if not error else ():
            kernels, error = compiled(Path(folder), capability)
            if error:
                break
            stack = max(kernel["resources"]["STACK"] for kernel in kernels)
            parts.append(f"sm_{capability} {len(kernels)} kernels, at most {stack} bytes of stack")
    print(f"triton {version}:", f"FAILED, {error}" if error else "; ".join(parts), flush=True)
    return error


def main() -> int:
    import torch

    print(f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    failed = [version for version in sys.argv[1:] or releases() if check(version)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
