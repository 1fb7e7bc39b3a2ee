"""The steps of docs/adding.md, in a copy of the tree."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import native

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```(?:python|py|cpp)\n(?:#|//) (add to )?(\S+\.(?:py|cpp))\n(.*?)```", re.DOTALL)
OPERATION = """
import sys, pytest, torch
torch.ops.load_library(sys.argv[1])
status = pytest.main(["-q", sys.argv[2]])
import fastkd
print("public", fastkd.squared_distance.__name__, fastkd.reference.squared_distance.__name__)
sys.exit(status)
"""
METHOD = """
import sys, pytest
if status := pytest.main(["-q", sys.argv[1]]):
    sys.exit(status)
from support_data import small_digits
from train import main
small_digits()
sys.exit(main(sys.argv[2:]))
"""


def section(title: str) -> list[tuple[bool, str, str]]:
    """(whether the lines are added to a file, its name, the lines) of each block under a heading."""
    text = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text.partition(f"## {title}\n")[2].partition("\n## ")[0])
    return [(bool(added), name, lines) for added, name, lines in blocks]


def follow(steps: list[tuple[bool, str, str]], tree: Path) -> None:
    """A copy of the tree with the steps done: imports go to the imports, other lines to the end."""
    for folder in ("fastkd", "tests", "benchmarks", "csrc"):
        leave = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / folder, tree / folder, ignore=leave)
    for path in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / path, tree)
    for library in (ROOT / "fastkd").glob("_C*.so"):
        (tree / "fastkd" / library.name).symlink_to(library)
    emulated = ROOT / "build" / "emulated"  # CUDA kernels for a CPU, which tests/helpers would compile anew
    emulated.mkdir(parents=True, exist_ok=True)
    (tree / "build").mkdir()
    (tree / "build" / "emulated").symlink_to(emulated)
    for added, name, lines in steps:
        path = tree / name
        if not added:
            assert not path.exists()
            path.parent.mkdir(exist_ok=True)
            path.write_text(lines, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        imports = "".join(re.findall(r"^from .*\n", lines, re.MULTILINE))
        before = [
            found for found in re.finditer(r"^from fastkd.*\n", text, re.MULTILINE) if found[0] < imports
        ]
        place = before[-1].end()
        rest = re.sub(r"^from .*\n", "", lines, flags=re.MULTILINE)
        path.write_text(text[:place] + imports + text[place:] + rest, encoding="utf-8")


def run(tree: Path, *command: str) -> str:
    paths = os.pathsep.join([str(tree), str(tree / "tests" / "helpers")])
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def library(tree: Path, added: str) -> Path:
    """The operation alone in a library, by the flags of setup.py, which would compile all of them."""
    names = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    compiler = shlex.split(os.environ.get("CXX", "")) or names[:1]
    if not compiler or not native.CPU.available:
        pytest.skip(f"no compiler, or no compiled library: {native.CPU.reason}")
    top = Path(torch.__file__).parent
    flags = ["-O1", "-std=c++17", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc", "-fPIC"]
    flags += ["-g0", "-fvisibility=hidden", "-Wall", "-Werror", "-isystem", str(top / "include")]

    # as one file, which reads PyTorch's headers once; the added one first, lest others include for it
    whole = "".join(f'#include "{source}"\n' for source in (added, "cpu/host.cpp", "common/tensor.cpp"))
    (tree / "added.cpp").write_text(whole, encoding="utf-8")
    link = ["-shared", f"-L{top / 'lib'}", "-ltorch_cpu", "-o", "added.so"]
    subprocess.run([*compiler, *flags, "added.cpp", *link], cwd=tree, check=True)
    return tree / "added.so"


@pytest.mark.slow
def test_an_operation_is_added_by_the_files_that_the_page_shows(tmp_path):
    steps = section("An operation")
    assert [name for _, name, _ in steps] == [
        "fastkd/reference/distance.py",
        "fastkd/reference/__init__.py",
        "fastkd/ops/distance.py",
        "fastkd/__init__.py",
        "csrc/cpu/distance/distance.cpp",
        "tests/ops/test_distance.py",
    ]
    follow(steps, tmp_path)
    added = library(tmp_path, "cpu/distance/distance.cpp")
    said = run(tmp_path, "-c", OPERATION, str(added), "tests/ops/test_distance.py")
    assert "9 passed" in said and "skipped" not in said
    assert said.endswith("public squared_distance squared_distance\n")
    if shutil.which("ruff"):
        files = [name for _, name, _ in steps if name.endswith(".py")]
        subprocess.run(["ruff", "check", "-q", *files], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_a_method_is_added_by_the_files_that_the_page_shows(tmp_path):
    steps = section("A method")
    assert [name for _, name, _ in steps] == ["fastkd/methods/vector.py", "tests/methods/test_vector.py"]
    follow(steps, tmp_path)
    flags = "--method kd+vector --dataset digits --option beta=5 --epochs 1 --no-pictures".split()
    flags += "--teacher resnet8 --student resnet8".split()
    shown = run(tmp_path, "-c", METHOD, "tests/methods/test_vector.py", *flags)
    assert "1 passed" in shown
    assert "method   vector+kd: 1 epoch of ce + vector + kd" in shown and "vector.beta=5.0" in shown
    rows = (tmp_path / "runs" / "results.csv").read_text().splitlines()
    assert ",vector+kd,digits," not in rows[1]
    assert "vector+kd,digits" in rows[2] and "vector.beta=5.0" in rows[2]
