"""What the build promises: libraries that ask for little, a quick import that compiles nothing, a package
that works with parts missing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from import_cases import OPERATION, PACKAGE, needs_cpu_library, output, python

from fastkd import native

ROOT = PACKAGE.parent
LIBRARIES = sorted(PACKAGE.glob("_C*.so"))


@pytest.mark.skipif(
    not LIBRARIES or not shutil.which("nm"), reason="no compiled library, or no nm to look into it"
)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_uses_only_the_stable_abi(library: Path) -> None:
    lines = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, text=True, capture_output=True
    ).stdout.splitlines()
    undefined = [line.split()[-1] for line in lines if line.split()[-2] == "U"]
    shim = [name for name in undefined if re.match(r"(aoti_)?torch_[a-z0-9_]+$", name)]
    assert shim
    assert [
        name
        for name in undefined
        if name not in shim and not re.search(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
    ] == []


@pytest.mark.skipif(not LIBRARIES, reason="no compiled library")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_library_tells_what_it_was_built_with_even_unloaded(library: Path) -> None:
    facts = native._build_info(str(library))
    assert facts["torch_target"] == "2.11"
    assert {"compiler", "torch_headers"} <= facts.keys()
    assert ("toolkit" in facts) == ("built" in facts) == ("cuda" in library.name)


def cuobjdump() -> str | None:
    """NVIDIA's tool that looks into a CUDA library: the toolkit's, or the one that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    beside = [
        Path(folder) / "backends" / "nvidia" / "bin"
        for folder in (spec.submodule_search_locations or [] if spec else [])
    ]
    return shutil.which("cuobjdump") or next(
        (found for folder in beside if (found := shutil.which("cuobjdump", path=folder))), None
    )


@pytest.mark.skipif(not (PACKAGE / "_C_cuda.abi3.so").exists(), reason=native.CUDA.reason)
@pytest.mark.skipif(not cuobjdump(), reason="no cuobjdump, which comes with Triton and with the CUDA toolkit")
def test_cuda_kernels_need_no_more_than_a_gpu_has() -> None:
    """No stack, where spills would be, and registers for at least two blocks a multiprocessor."""
    command = [str(cuobjdump()), "--dump-resource-usage", PACKAGE / "_C_cuda.abi3.so"]
    said = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    kernels = []
    for part in said.split("arch = ")[1:]:
        found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", part)
        kernels += [(name, part.split()[0], *map(int, numbers)) for name, *numbers in found]
    built = native._build_info(str(PACKAGE / "_C_cuda.abi3.so"))["architectures"]
    codes = {code for code in built if code.startswith("sm_")}
    for operation in (
        "loss_kernel",
        "gradient_kernel",
        "map_kernel",
        "fsp_forward",
        "fsp_backward",
        "fsp_pool",
    ):
        assert {code for name, code, *_ in kernels if operation in name} == codes
    for name, code, registers, stack, shared, local in kernels:
        assert (stack, local) == (0, 0), f"{name} on {code}: {stack} bytes of stack, {local} of local memory"
        # blocks of 128 threads, not 256
        most = 255 if "fsp_forward" in name or "fsp_backward" in name else 128
        assert 0 < registers <= most and shared <= 48 << 10, (
            f"{name} on {code}: {registers} registers, {shared} bytes of shared memory"
        )


def test_import_is_quick_and_starts_no_process() -> None:
    code = """
import json, sys, time, torch
started = []
starts = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec")
sys.addaudithook(lambda event, _: event in starts and started.append(event))
begin = time.perf_counter()
import fastkd
print(json.dumps([time.perf_counter() - begin, started]))
"""
    for _ in range(5):  # a busy machine can only make an import look slower than it is
        seconds, started = json.loads(output(code))
        assert started == []
        if seconds <= 0.2:
            return
    pytest.fail(f"import fastkd took {seconds:.3f} s after import torch")


def test_imports_and_works_with_pytorch_alone() -> None:
    code = f"""
import sys
for name in ("torchvision", "triton", "numpy", "sklearn", "tqdm", "matplotlib"):
    sys.modules[name] = None
import torch, fastkd, fastkd.models, fastkd.methods, fastkd.compat.kdzoo, fastkd.compat.repdistiller
{OPERATION}
"""
    output(code, new=True)


@needs_cpu_library
def test_cpu_path_can_be_forced() -> None:
    usual = native.cpu_path()
    assert usual in native.cpu_paths()
    assert "portable" in native.cpu_paths()
    assert native.cpu_path() == usual
    try:
        for name in native.cpu_paths():
            native.set_cpu_path(name)
            assert native.cpu_path() == name
        for name in sorted({*native.CPU_PATHS} - {*native.cpu_paths()}):
            with pytest.raises(ValueError, match=f"'{name}' cannot run here"):
                native.set_cpu_path(name)
        with pytest.raises(ValueError, match=r"'mmx'.*'portable', 'neon', 'avx2', 'avx512'"):
            native.set_cpu_path("mmx")
    finally:
        native.set_cpu_path(usual)


@needs_cpu_library
def test_fastkd_cpu_forces_the_path_from_the_start() -> None:
    assert (
        output("from fastkd import native; print(native.cpu_path())", FASTKD_CPU="portable").strip()
        == "portable"
    )


def test_fastkd_cpu_with_an_unknown_name_stops_the_import() -> None:
    done = python("import fastkd", FASTKD_CPU="mmx")
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "ValueError: FASTKD_CPU is 'mmx', wanted one of 'portable', 'neon', 'avx2', 'avx512'"
    )


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree")
@pytest.mark.parametrize(
    ("switch", "value", "wanted"),
    [
        ("FASTKD_BUILD", "yes", "FASTKD_BUILD is 'yes', wanted 0 or 1"),
        ("FASTKD_CUDA", "2", "FASTKD_CUDA is '2', wanted 0 or 1 or auto"),
        ("MAX_JOBS", "many", "MAX_JOBS is 'many', wanted a number from 1 up"),
        ("CXX", "no-such-compiler", "FASTKD_BUILD=0"),
        ("CXX", "false", "'false' does not work as a C++ compiler"),
    ],
)
def test_build_misuse_is_one_sentence(switch: str, value: str, wanted: str, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, switch: value}, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("fastkd: ")
    assert wanted in sentence


@needs_cpu_library
def test_the_report_does_not_touch_the_code_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may be computing: their kernels must not change for the time of a report."""
    functions, chosen = native._functions(), []

    class Watched:
        def __getattr__(self, name: str) -> object:
            if name.startswith("fastkd_set"):
                chosen.append(name)
            return getattr(functions, name)

    monkeypatch.setattr(native, "_functions", Watched)
    report = native.report()["cpu"]
    assert native.cpu_paths() == report["code_paths"]
    assert chosen == []


@needs_cpu_library
def test_a_code_path_that_was_not_built_is_told_from_one_that_the_processor_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Library:
        """Of clang 15, on a processor without AVX-512."""

        status = {b"portable": 0, b"neon": 4, b"avx2": 3, b"avx512": 2}

        def fastkd_find_cpu_path(self, name: bytes) -> int:
            return self.status.get(name, 1)

        fastkd_set_cpu_path = fastkd_find_cpu_path

    monkeypatch.setattr(native, "_functions", Library)
    assert native.cpu_paths() == ["portable"]
    built = "it was not built, which takes GCC or clang 16"
    with pytest.raises(ValueError, match=rf"'avx2' cannot run here: {built}; these can: 'portable'"):
        native.set_cpu_path("avx2")
    with pytest.raises(
        ValueError, match="'avx512' cannot run here: this processor lacks it; these can: 'portable'"
    ):
        native.set_cpu_path("avx512")
    with pytest.raises(ValueError, match="'neon' cannot run here: it is for another kind of processor"):
        native.set_cpu_path("neon")
    # which no report need mention
    assert native._missing_cpu_paths() == [f"avx2 ({built})", "avx512 (this processor lacks it)"]
