#!/usr/bin/env python
"""Trains the same short runs with an old commit and with this tree, and compares the weights bit for bit.

    python tests/packaging/same_bits.py COMMIT            all recipes on digits, one thread
    python tests/packaging/same_bits.py COMMIT --only fsp the runs whose name holds that word

COMMIT may also be a folder with a built tree. A commit is checked out into a temporary folder and gets this
tree's compiled libraries, so both compute with the same kernels. Exit status 1 where a run differs.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ("hankyul2", "zagoruyko", "repdistiller", "mdistiller", "kdzoo", "sakd", "digits")
SMALL = [
    "--dataset",
    "digits",
    "--teacher",
    "resnet8",
    "--student",
    "resnet8",
    "--device",
    "cpu",
    "--no-pictures",
    "--batch-size",
    "64",
]
CLOCKED = ("seconds", "images_per_second")


def jobs() -> dict[str, list[str]]:
    """Flags by name: every recipe with a sum and with FSP, every method once, bfloat16 once."""
    found = {}
    for recipe in RECIPES:
        for method in ("at+kd", "fsp"):
            found[f"{recipe} {method}"] = ["--recipe", recipe, "--method", method, "--epochs", "1"]
    for method in ("baseline", "kd", "at"):
        found[f"digits {method}"] = ["--recipe", "digits", "--method", method, "--epochs", "2"]
    found["digits at+kd bf16"] = "--recipe digits --method at+kd --epochs 1 --precision bf16".split()
    return found


def digest(output: Path) -> str:
    """Of all weights, momenta and figures of the runs in ``output`` that no clock wrote."""
    import torch

    found = hashlib.blake2b(digest_size=16)
    for path in sorted(
        output.glob("**/*.pt"), key=lambda path: (path.name, path.parent.name.partition("-")[0])
    ):
        state = torch.load(path, map_location="cpu", weights_only=True)
        parts = [
            state["model"],
            state.get("optimizer", {}).get("state", {}),
            state.get("teacher", {}),
            state.get("best", {}),
        ]
        for tensor in torch.utils._pytree.tree_leaves(parts):
            if isinstance(tensor, torch.Tensor):
                found.update(tensor.double().numpy().tobytes())  # exact, whatever the dtype
    for path in sorted(
        output.glob("*/*.csv"), key=lambda path: (path.name, path.parent.name.partition("-")[0])
    ):
        with open(path, newline="") as file:
            rows = [
                {key: value for key, value in row.items() if key not in CLOCKED}
                for row in csv.DictReader(file)
            ]
        found.update(json.dumps(rows).encode())
    return found.hexdigest()


def work(tree: Path, names: list[str]) -> None:
    """In a process of its own, started in ``tree``: a digest a line."""
    import torch

    torch.set_num_threads(1)
    main = runpy.run_path(str(tree / "train.py"))["main"]
    for name in names:
        with tempfile.TemporaryDirectory() as output:
            screen, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115
            try:
                status = main([*jobs()[name], *SMALL, "--no-compile", "--output", output])
            finally:
                sys.stdout = screen
            print(
                json.dumps([name, digest(Path(output)) if status == 0 else f"exit status {status}"]),
                flush=True,
            )


def start(tree: Path, names: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tree), "--work", *names]
    return subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)


def checked_out(commit: str, folder: Path) -> Path:
    tree = folder / "tree"
    tree.mkdir()
    archive = subprocess.Popen(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x"], cwd=tree, stdin=archive.stdout, check=True)
    if archive.wait():
        sys.exit(2)  # git said why
    for library in glob.glob(str(ROOT / "fastkd" / "_C*.so")):
        shutil.copy(library, tree / "fastkd")
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="COMMIT")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--work", nargs="*", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work is not None:
        work(Path(flags.old), flags.work)
        return 0
    names, differ = [name for name in jobs() if flags.only in name], 0
    with tempfile.TemporaryDirectory() as folder:
        old = Path(flags.old).resolve() if Path(flags.old).is_dir() else checked_out(flags.old, Path(folder))
        running = [start(tree, names) for tree in (old, ROOT)]
        for name in names:
            lines = [process.stdout.readline() if process.stdout else "" for process in running]
            found = [json.loads(line)[1] if line else "no answer" for line in lines]
            same = found[0] == found[1] and "exit" not in found[0] and found[0] != "no answer"
            differ += not same
            print(f"{name:24} {'same bits' if same else f'DIFFERS: {found[0]}, {found[1]}'}", flush=True)
        for process in running:
            process.wait()
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
