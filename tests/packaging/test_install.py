"""What setup.py and csrc/toolchain.py promise, on a tree of a few small files and with stand-ins for what a
machine may have.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from install_cases import ROOT, SETTINGS

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
SHOW = "import sys; sys.path.insert(0, 'csrc'); import toolchain; print("


@pytest.fixture(scope="module")
def toolchain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that asks for nothing."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def machine(plain: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands of a machine with a CUDA toolkit that knows 8.0 to 10.0, and no GPU."""
    top = tmp_path / "cuda"
    codes = " ".join(f"echo sm_{n};" for n in (80, 86, 90, 100))
    script(top / "bin", "nvcc", f'case "$*" in *--list-gpu-code*) {codes} ;; *) echo release 13.0, ;; esac')
    for file in ("include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (top / file).parent.mkdir(exist_ok=True)
        (top / file).touch()
    commands = tmp_path / "commands"
    script(commands, "nvidia-smi", "exit 9")
    plain.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    plain.setenv("CUDA_HOME", str(top))
    return commands


@pytest.mark.parametrize(
    ("gpus", "variables", "architectures", "why"),
    [
        (
            "",
            {},
            None,
            (
                "no GPU of 8.0 or later was seen, and neither FASTKD_CUDA=1 nor TORCH_CUDA_ARCH_LIST asked"
                " for it"
            ),
        ),
        (
            "7.5",
            {},
            None,
            (
                "no GPU of 8.0 or later was seen, and neither FASTKD_CUDA=1 nor TORCH_CUDA_ARCH_LIST asked"
                " for it"
            ),
        ),
        ("9.0 9.0", {}, ["9.0+PTX"], "for the GPU seen here (9.0)"),
        ("9.0 8.6", {}, ["8.6", "9.0+PTX"], "for the GPU seen here (8.6, 9.0)"),
        # newer than the toolkit, which has PTX for it
        ("12.0", {}, ["10.0+PTX"], "for the GPU seen here (12.0)"),
        ("9.0", {"TORCH_CUDA_ARCH_LIST": "native"}, ["9.0+PTX"], "for the GPU seen here (9.0)"),
        (
            "",
            {"TORCH_CUDA_ARCH_LIST": "native"},
            None,
            "TORCH_CUDA_ARCH_LIST=native, but no GPU of 8.0 or later was seen",
        ),
        ("9.0", {"TORCH_CUDA_ARCH_LIST": "8.0 Ada"}, ["8.0", "8.9+PTX"], "TORCH_CUDA_ARCH_LIST=8.0 Ada"),
        ("", {"TORCH_CUDA_ARCH_LIST": "9.0a"}, ["9.0a"], "TORCH_CUDA_ARCH_LIST=9.0a"),
        ("", {"FASTKD_CUDA": "1"}, ["8.0", "9.0", "10.0+PTX"], "FASTKD_CUDA=1"),
        ("9.0", {"FASTKD_CUDA": "1"}, ["8.0", "9.0", "10.0+PTX"], "FASTKD_CUDA=1"),
        ("9.0", {"FASTKD_CUDA": "0"}, None, "FASTKD_CUDA=0"),
        (
            "9.0",
            {"CUDA_HOME": "/none"},
            None,
            "CUDA_HOME is /none, but bin/nvcc and include/cuda_runtime.h are not both there",
        ),
    ],
)
def test_the_cuda_library_is_built_for_what_is_seen_or_asked_for(
    toolchain: ModuleType,
    machine: Path,
    plain: pytest.MonkeyPatch,
    gpus: str,
    variables: dict,
    architectures: list | None,
    why: str,
) -> None:
    if gpus:
        script(machine, "nvidia-smi", "".join(f"echo {gpu}\n" for gpu in gpus.split()))
    for name, value in variables.items():
        plain.setenv(name, value)
    plan = toolchain.cuda()
    assert plan.why == why
    assert (plan.architectures if plan.toolkit else None) == architectures


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("CUDA_HOME", "/none", r"FASTKD_CUDA=1, but no CUDA toolkit: CUDA_HOME is /none.*"),
        ("TORCH_CUDA_ARCH_LIST", "native", r"FASTKD_CUDA=1, TORCH_CUDA_ARCH_LIST=native, but no GPU .* seen"),
    ],
)
def test_a_library_that_is_insisted_on_and_cannot_be_built_is_one_sentence(
    toolchain: ModuleType, machine: Path, plain: pytest.MonkeyPatch, name: str, value: str, why: str
) -> None:
    plain.setenv("FASTKD_CUDA", "1")
    plain.setenv(name, value)
    with pytest.raises(SystemExit, match=rf"^\nfastkd: {why}\.\n$"):
        toolchain.cuda()


def test_a_broken_nvcc_is_no_traceback(
    toolchain: ModuleType, machine: Path, plain: pytest.MonkeyPatch
) -> None:
    script(Path(os.environ["CUDA_HOME"]) / "bin", "nvcc", "exit 1")
    script(machine, "nvidia-smi", "echo 9.0")
    plan = toolchain.cuda()
    assert plan.toolkit is None and "nvcc does not run" in plan.why


def test_architectures_by_name_are_those_of_pytorch(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    table = re.findall(
        r"\('([A-Z][\w+]*)', '([\d.;+PTX]+)'\)", inspect.getsource(cpp_extension._get_cuda_arch_flags)
    )
    assert len(table) >= 13
    for name, listed in table:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", name)
        wanted = cpp_extension._get_cuda_arch_flags()
        assert (
            sorted({flag for entry in toolchain.architectures(name) for flag in toolchain.gencode(entry)})
            == wanted
        ), name
        assert toolchain.architectures(name) == listed.split(";")


@pytest.mark.parametrize("wrong", ["Hooper", "8", "8.0+PTX+PTX", "sm_90"])
def test_an_unknown_architecture_is_named(toolchain: ModuleType, wrong: str) -> None:
    with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST contains '{re.escape(wrong)}'"):
        toolchain.architectures(f"8.0;{wrong}")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a CPU")
def test_jobs_are_the_cpus_that_the_process_may_use(toolchain: ModuleType, plain: pytest.MonkeyPatch) -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); " + SHOW + "toolchain.jobs())"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True).stdout == "1\n"
    )
    plain.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    plain.setattr(Path, "read_text", lambda _: "350000 100000\n")  # three and a half CPUs for this container
    assert toolchain.jobs() == 3
    plain.setattr(Path, "read_text", lambda _: "max 100000\n")
    assert toolchain.jobs() == 64
    plain.setenv("MAX_JOBS", "5")
    assert toolchain.jobs() == 5


@pytest.mark.parametrize("command", ["false", "true", "no-such-compiler"])
def test_no_compiler_is_one_sentence(toolchain: ModuleType, plain: pytest.MonkeyPatch, command: str) -> None:
    plain.setenv("CXX", command)
    with pytest.raises(SystemExit, match=rf"^\nfastkd: .*'{command}'.*set CXX.*FASTKD_BUILD=0.*\.\n$"):
        toolchain.cxx()


def test_a_compiler_that_is_too_old_is_one_sentence(
    toolchain: ModuleType, plain: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    macros = "echo '#define __cplusplus 201703L'; echo '#define __GNUC__ 9'"
    script(tmp_path, "g++-9", f'case "$*" in *version*) echo "g++ 9.5.0" ;; *) {macros} ;; esac')
    plain.setenv("CXX", str(tmp_path / "g++-9"))
    with pytest.raises(
        SystemExit, match=r"the C\+\+ compiler is g\+\+ 9\.5\.0, wanted GCC 10 or later, or clang"
    ):
        toolchain.cxx()


def test_torch_is_found_without_importing_it(toolchain: ModuleType) -> None:
    folder, version = toolchain.torch()
    assert folder == Path(torch.__file__).parent
    assert version == torch.__version__
