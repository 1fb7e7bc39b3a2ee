"""The machine code of the CUDA library, read with NVIDIA's tools: what a CPU that emulates the kernels cannot show."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastkd
from fastkd import native

LIBRARY = Path(fastkd.__file__).parent / "_C_cuda.abi3.so"


def tool() -> str | None:
    """cuobjdump with nvdisasm beside it: Triton's wheel has both."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(folder) / "backends" / "nvidia" / "bin" for folder in (spec.submodule_search_locations or [] if spec else [])]
    found = [shutil.which("cuobjdump", path=folder) for folder in folders if shutil.which("nvdisasm", path=folder)]
    return next(filter(None, found), None)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=native.CUDA.reason),
    pytest.mark.skipif(not tool(), reason="no cuobjdump and nvdisasm, which come with Triton"),
]
BUILT = (native._build_info(str(LIBRARY)) or {}).get("architectures", []) if LIBRARY.exists() else []
ARCHITECTURES = [name for name in BUILT if name.startswith("sm_")]


@functools.cache
def kernels(architecture: str) -> list[str]:
    command = [str(tool()), "-res-usage", "-arch", architecture, LIBRARY]
    return re.findall(r"Function (\w+):", subprocess.run(command, check=True, text=True, capture_output=True).stdout)


@functools.cache
def instructions(kernel: str, architecture: str) -> collections.Counter[str]:
    """How often each instruction stands in a kernel, of which `kernel` is a part of the mangled name."""
    (name,) = [name for name in kernels(architecture) if re.search(rf"\d{kernel}", name)]
    command = [str(tool()), "-sass", "-arch", architecture, "-fun", name, LIBRARY]
    said = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return collections.Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", said, re.MULTILINE))


# For each type of a feature, each layout: so many packs of a tensor are on their way at once, kUnroll or kUnrollTwo of csrc/cuda.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel, types, packs",
    [
        ("gradient_kernelIf", 3, 4),
        ("gradient_kernelId", 4, 4),
        ("map_gradient_kernelILb0Ef", 3, 4),
        ("map_gradient_kernelILb0Ed", 1, 4),
        ("map_gradient_kernelILb1Ef", 3, 2),
        ("map_gradient_kernelILb1Ed", 1, 2),
        ("map_kernelILb1Ef", 3, 2),
        ("map_kernelILb1Ed", 1, 2),
    ],
)
def test_features_are_written_sixteen_bytes_at_a_time_in_both_layouts(architecture, kernel, types, packs):
    found = instructions(kernel, architecture)
    assert found["STG.E.128"] >= 2 * types * packs, found
    if kernel.endswith("f") and "map_kernel" not in kernel:  # what is written number by number: float32
        assert found["STG.E"] <= 2 * packs, found
