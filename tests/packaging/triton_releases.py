"""Compiles every launcher's kernels with each release of Triton that fastkd supports, without a GPU.

    python tests/packaging/triton_releases.py            every release on the index from 3.6.0 on
    python tests/packaging/triton_releases.py 3.7.1      this one
    python tests/packaging/triton_releases.py --few      of sm_80 and sm_90 only as much as holds every kernel
    python tests/packaging/triton_releases.py --vectors  the kernels of losses of embeddings alone

Prints a line for each release and architecture and fails if one fails. Needs PyTorch and pip; a release takes
200 MB and some minutes. What is compiled is in tests/helpers/triton_cases.py: all its cases for sm_90,
enough of them for every kernel elsewhere; and all of tests/helpers/triton_vector_cases.py. Triton's cache
keeps what was compiled: a run that was stopped soon comes to where it was.
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


def compiled(site: Path, capability: int, cases: list[str]) -> tuple[list[dict], str]:
    """What triton_compile.py says of each kernel with the Triton in ``site``, or its last error line."""
    env = os.environ | {
        "PYTHONPATH": f"{site}{os.pathsep}{ROOT}",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, COMPILE, str(capability), *cases], env=env, capture_output=True, text=True
    )
    if done.returncode:
        error = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", done.stderr, re.MULTILINE)
        return [], error[-1] if error else done.stderr[-200:]
    return [kernel for case in json.loads(done.stdout) for kernel in case["kernels"]], ""


def check(version: str, few: bool, vectors: bool) -> bool:
    """Prints a line for each architecture; whether all compiled."""
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            print(f"triton {version}: FAILED, {done.stderr.strip().splitlines()[-1]}", flush=True)
            return False
        good = True
        for capability in CAPABILITIES[: 2 if few else 3]:
            cases = ["vectors"] if vectors else ["few"] if few or capability != 90 else []
            kernels, error = compiled(Path(folder), capability, cases)
            used = [kernel["resources"] for kernel in kernels]
            told = f"FAILED, {error}"
            if not error:
                most = {name: max(kernel[name] for kernel in used) for name in ("REG", "STACK", "LOCAL")}
                told = f"{len(kernels)} kernels; at most " + ", ".join(f"{n} {k}" for k, n in most.items())
            print(f"triton {version}, sm_{capability}: {told}", flush=True)
            good = good and not error
    return good


def main() -> int:
    import torch

    few, vectors = ("--few" in sys.argv[1:], "--vectors" in sys.argv[1:])
    wanted = [word for word in sys.argv[1:] if not word.startswith("--")]
    print(f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    failed = [version for version in wanted or releases() if not check(version, few, vectors)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
