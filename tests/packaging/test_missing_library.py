"""Without a compiled library, or with one that does not load: what serves, and what is said."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from import_cases import OPERATION, PACKAGE, needs_cpu_library, output, python

import fastkd


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the package as FASTKD_BUILD=0 installs it."""
    return Path(
        shutil.copytree(PACKAGE, tmp_path / "fastkd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    )


def test_without_a_library_the_reference_serves_and_cpp_says_why(bare: Path) -> None:
    code = f"""
import torch, fastkd
from fastkd import native
{OPERATION}
print(native.CPU)
try:
    with fastkd.use_backend("cpp"):
        {OPERATION}
except fastkd.BackendError as error:
    print(error)
"""
    library, error = output(code, bare).splitlines()
    assert "available=False" in library
    assert "path=None" in library
    assert "cpp" in error
    assert "pip install" in error


def test_a_library_that_does_not_load_says_for_what_it_was_built(bare: Path) -> None:
    facts = json.dumps({"torch_target": "9.87", "compiler": "some compiler 1.0"}).encode()
    (bare / "_C.abi3.so").write_bytes(b"not a library\0fastkd-build-info:" + facts + b"\0")
    reason = output(
        f"import torch, fastkd; {OPERATION}; print(fastkd.native.CPU.available, fastkd.native.CPU.reason)",
        bare,
    )
    assert reason.startswith("False")
    for part in ("_C.abi3.so", "does not load", "9.87", "some compiler 1.0", fastkd.native.torch.__version__):
        assert part in reason


def warnings_of(code: str, package: Path, **environment: str) -> list[str]:
    """The first line of each warning that the code's calls of losses cause, which point at the code."""
    done = python(
        f"import warnings; warnings.simplefilter('always'); import torch, fastkd; {code}",
        package,
        **environment,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(.*):\d+: UserWarning: (.*)", done.stderr)
    assert {file for file, _ in found} <= {"<string>"}, found
    return [message for _, message in found]


TWICE = f"{OPERATION}; fastkd.fsp_matrix(torch.ones(1, 2, 3), torch.ones(1, 2, 3)); {OPERATION}"


def test_a_missing_library_is_warned_of_once(bare: Path) -> None:
    (warning,) = warnings_of(TWICE, bare)
    assert (
        warning
        == f"fastkd serves CPU tensors by its plain PyTorch reference: {bare / '_C.abi3.so'} is not there: "
        "built with FASTKD_BUILD=0, or not yet (`pip install .` builds it)"
    )


def test_a_broken_library_is_warned_of_once(bare: Path) -> None:
    (bare / "_C.abi3.so").write_bytes(b"not a library")
    (warning,) = warnings_of(TWICE, bare)
    assert "plain PyTorch reference" in warning and "does not load into torch" in warning


def test_a_source_folder_that_hides_the_installed_package_is_named(bare: Path, tmp_path: Path) -> None:
    """After `pip install .` in a clone, what is imported there is the clone, without a library."""
    installed = tmp_path / "site-packages" / "fastkd"
    shutil.copytree(bare, installed)
    (installed / "_C.abi3.so").touch()
    (bare.parent / "setup.py").touch()
    path = os.pathsep.join((str(bare.parent), str(installed.parent)))
    (warning,) = warnings_of(TWICE, bare, PYTHONPATH=path)
    hides = (
        f"{bare} has no compiled library and hides the installed package in {installed}: `pip install -e .`"
        " builds it here"
    )
    assert warning == f"fastkd serves CPU tensors by its plain PyTorch reference: {hides}"
    report = "import runpy, sys; sys.argv[1:] = ['--json']; runpy.run_module('fastkd', run_name='__main__')"
    assert json.loads(output(report, bare, PYTHONPATH=path))["native"]["cpu"]["reason"] == hides


def test_the_reference_by_name_is_not_warned_of(bare: Path) -> None:
    assert warnings_of(TWICE, bare, FASTKD_BACKEND="reference") == []
    assert warnings_of(f"\nwith fastkd.use_backend('reference'): {OPERATION}", bare) == []


@needs_cpu_library
def test_a_library_that_is_there_is_not_warned_of() -> None:
    assert warnings_of(TWICE, PACKAGE) == []
