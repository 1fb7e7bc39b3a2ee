"""What setup.py builds, and asks for, on a tree of a few small files."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from install_cases import ROOT, SETTINGS

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
needs_ninja = pytest.mark.skipif(
    not shutil.which("ninja") and not importlib.util.find_spec("ninja"), reason="ninja is not installed"
)


def run_setup(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = (
        {name: value for name, value in os.environ.items() if name not in SETTINGS}
        | {"MAX_JOBS": "2"}
        | variables
    )
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, timeout=300)


def test_an_old_setuptools_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    done = run_setup(ROOT, "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith(
        "fastkd: building needs setuptools>=77, found 65.5.0: `pip install -U setuptools`"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with the real build and metadata, and next to nothing to compile."""
    pytest.importorskip("setuptools", minversion="77")
    tree = tmp_path / "tree"
    (tree / "csrc" / "cpu" / "three").mkdir(parents=True)
    (tree / "csrc" / "common").mkdir()
    (tree / "fastkd").mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "csrc/toolchain.py",
        "csrc/common/build_info.cpp",
    ):
        shutil.copy(ROOT / name, tree / name)
    (tree / "fastkd" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    (tree / "fastkd" / "py.typed").touch()
    (tree / "csrc" / "cpu" / "one.h").write_text("inline int one() { return 1; }\n")
    (tree / "csrc" / "cpu" / "one.cpp").write_text('#include "one.h"\nint first() { return one(); }\n')
    (tree / "csrc" / "cpu" / "two.cpp").write_text("int second() { return 2; }\n")
    kernel = (
        '#include "../one.h"\nnamespace FASTKD_PATH { int third() { return one() + FASTKD_VECTOR_BYTES; } }\n'
    )
    (tree / "csrc" / "cpu" / "three" / "kernels.cpp").write_text(kernel)
    return tree


@needs_ninja
def test_an_edit_compiles_what_it_concerns_and_nothing_else(tree: Path) -> None:
    def made(**variables: str) -> set[str]:
        done = run_setup(tree, "build_ext", "--inplace", "--build-temp", "temp", FASTKD_CUDA="0", **variables)
        assert done.returncode == 0, done.stderr
        assert (tree / "fastkd" / "_C.abi3.so").is_file() and not (
            tree / "fastkd" / "_C_cuda.abi3.so"
        ).exists()
        return {Path(name).name for name in re.findall(r"-o (\S+)", done.stdout)}

    paths = {"x86_64": ("portable", "avx2", "avx512"), "aarch64": ("portable", "neon")}
    kernels = {f"kernels.cpp.{path}.o" for path in paths.get(platform.machine(), ("portable",))}
    library = {"_C.abi3.so"}
    everything = kernels | {"one.cpp.o", "two.cpp.o", "build_info.cpp.o"} | library
    assert made() == everything
    assert made() == set()
    (tree / "csrc" / "cpu" / "one.h").write_text("inline int one() { return 11; }\n")
    assert made() == kernels | {"one.cpp.o"} | library
    (tree / "csrc" / "cpu" / "two.cpp").write_text("int second() { return 22; }\n")
    assert made() == {"two.cpp.o"} | library
    assert made(CXXFLAGS="-O1") == everything  # other flags
    # held open, so that its number is not given to another file
    with (tree / "fastkd" / "_C.abi3.so").open("rb") as loaded:
        assert made() == everything
        # whoever has it loaded keeps the old one
        assert (tree / "fastkd" / "_C.abi3.so").stat().st_ino != os.fstat(loaded.fileno()).st_ino


@needs_ninja
def test_what_does_not_compile_is_one_sentence_at_the_end(tree: Path) -> None:
    (tree / "csrc" / "cpu" / "two.cpp").write_text("wrong\n")
    done = run_setup(tree, "build_ext", "--inplace", "--build-temp", "temp", FASTKD_CUDA="0")
    assert done.returncode == 1
    assert "two.cpp" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith("fastkd: compiling failed, as said above")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("build", "wanted"), [("0", set()), ("1", {"torch>=2.11", "ninja"})])
def test_a_build_asks_for_what_it_needs(tree: Path, build: str, wanted: set[str]) -> None:
    code = (
        "import json; from setuptools import build_meta as b; needs = b.get_requires_for_build_wheel();"
        " print(json.dumps(needs))"
    )
    environment = {**os.environ, "FASTKD_BUILD": build}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == wanted


def test_the_wheel_says_that_it_is_typed_and_the_sdist_is_whole(tree: Path) -> None:
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    environment = {**os.environ, "FASTKD_BUILD": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    assert wheel.name == "fastkd-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert "fastkd/py.typed" in archive.namelist()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/toolchain.py", "csrc/cpu/one.h", "csrc/cpu/three/kernels.cpp"} <= names


def test_the_manifest_names_files_that_are_there() -> None:
    for line in (ROOT / "MANIFEST.in").read_text().splitlines():
        command, *names = line.split()
        if command in ("include", "graft"):
            assert all((ROOT / name).exists() for name in names), line


def test_uv_builds_anew_for_whatever_a_build_depends_on() -> None:
    tomllib = pytest.importorskip("tomllib")
    keys = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["cache-keys"]
    variables = {key["env"] for key in keys if "env" in key}
    text = (ROOT / "setup.py").read_text() + (ROOT / "csrc" / "toolchain.py").read_text()
    read = set(re.findall(r'(?:switch|words|environ\.get)\("(\w+)"', text))
    assert read - {"MAX_JOBS"} <= variables  # which changes no byte of a library
    files = {key["file"] for key in keys if "file" in key}
    assert {"pyproject.toml", "setup.py", "csrc/**/*"} <= files
    assert "uv.lock" in (ROOT / ".gitignore").read_text().split()
