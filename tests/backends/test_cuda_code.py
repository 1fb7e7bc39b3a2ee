"""The machine code of the CUDA library, read with NVIDIA's tools. It shows what emulated kernels cannot."""

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
    places = spec.submodule_search_locations or [] if spec else []
    folders = [Path(place) / "backends" / "nvidia" / "bin" for place in places]
    found = [
        shutil.which("cuobjdump", path=folder) for folder in folders if shutil.which("nvdisasm", path=folder)
    ]
    return next(filter(None, found), None)


pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason=native.CUDA.reason),
    pytest.mark.skipif(not tool(), reason="no cuobjdump and nvdisasm, which come with Triton"),
]
BUILT = (native._build_info(str(LIBRARY)) or {}).get("architectures", []) if LIBRARY.exists() else []
ARCHITECTURES = [name for name in BUILT if name.startswith("sm_")]


@functools.cache
def registers(architecture: str) -> dict[str, int]:
    """Those that a thread of each kernel has, by the kernel's mangled name."""
    command = [str(tool()), "-res-usage", "-arch", architecture, LIBRARY]
    said = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s+REG:(\d+)", said)}


def mangled(kernel: str, architecture: str) -> str:
    """The name of a kernel of which ``kernel`` is a part."""
    (name,) = [name for name in registers(architecture) if re.search(rf"\d{kernel}", name)]
    return name


@functools.cache
def listing(kernel: str, architecture: str) -> list[tuple[str, str]]:
    """The instructions of a kernel, each with its operands; `kernel` is a part of its mangled name."""
    command = [str(tool()), "-sass", "-arch", architecture, "-fun", mangled(kernel, architecture), LIBRARY]
    said = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", said, re.MULTILINE)


@functools.cache
def code(kernel: str, architecture: str) -> list[tuple[str, list[str]]]:
    """The instructions of a kernel, each with its registers."""
    found = listing(kernel, architecture)
    return [(operation, re.findall(r"\bR\d+\b", operands)) for operation, operands in found]


def instructions(kernel: str, architecture: str) -> collections.Counter[str]:
    return collections.Counter(operation for operation, _ in code(kernel, architecture))


def loads_at_once(kernel: str, architecture: str) -> list[int]:
    """How many loads from global memory are on their way each time that the first of them is waited for."""
    waiting: list[str] = []
    found = []
    for operation, registers in code(kernel, architecture):
        is_load = operation.startswith("LDG")
        if set(waiting) & set(registers if operation.startswith("ST") else registers[1:]):
            found.append(len(waiting))
            waiting = []
        if is_load:
            waiting.append(registers[0])
    return found


def chosen_policies(found: list[tuple[str, str]]) -> list[bool]:
    """Of each load of 16 bytes: whether what the second-level cache is told about it was chosen by the code.

    The instruction has it in a pair of uniform registers. Without a hint that is a constant of the launch;
    with one that is chosen as a kernel runs, it comes from other registers.
    """
    last, chosen = {}, []
    for operation, operands in found:
        written = re.match(r"\s*UR(\d+)\b", operands)
        if written and not operation.startswith("LDG"):
            last[int(written[1])] = operation
        used = re.search(r"\bdesc\[UR(\d+)\]", operands)
        if operation == "LDG.E.128" and used:
            chosen.append(last.get(int(used[1]) + 1, "").startswith("R2UR"))
    return chosen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel", ["loss_kernelIf", "gradient_kernelIf", "map_kernelILb0Ef", "map_gradient_kernelILb0Ef"]
)
def test_four_blocks_of_attention_share_a_multiprocessor(architecture, kernel):
    """By their registers: there are 65,536, and a block has 256 threads (``kBlocks`` of csrc/cuda). Fewer
    blocks would have fewer bytes on their way.
    """
    assert registers(architecture)[mangled(kernel, architecture)] <= 65536 // (4 * 256)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel, types",
    [("loss_kernelIf", 3), ("loss_kernelId", 4), ("gradient_kernelIf", 3), ("gradient_kernelId", 4)],
)
def test_the_cache_is_told_what_is_read_for_the_last_time(architecture, kernel, types):
    """Attention transfer's features, of each type in both layouts, 4 packs at once: each load asks
    ``MatrixView::once`` whether the second-level cache gives it up first. The forward pass keeps what the
    backward pass reads again.
    """
    found = chosen_policies(listing(kernel, architecture))
    assert len(found) >= 2 * 4 * types and all(found), found


# For each type of a feature and each layout: a thread has so many packs of a tensor on their way at once,
# kUnroll or kUnrollTwo of csrc/cuda.
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


# The products of 32 x 32 numbers and 16 terms stand in the code once for G and twice for the difference of
# two. Each has 2 x 4 fragments of two instructions (bfloat16: one), and three times as many with low parts.
# Operands have 4 fragments of 4 words. With low parts each word is rounded twice, and those of `a` are made
# twice.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode, products, roundings", [(1, 48, 96), (2, 144, 288), (3, 72, 0)])
def test_products_and_roundings_of_fsp_are_as_few_as_can_be(architecture, mode, products, roundings):
    """sm_90 and later round to tf32 in one instruction, earlier ones in several."""
    found = instructions(f"fsp_forwardIfLNS_4ModeE{mode}", architecture)
    assert sum(count for name, count in found.items() if name.startswith("HMMA")) == products
    older = int(architecture.strip("sm_af")) < 90
    assert found["F2FP.TF32.F32.PACK_B"] == (0 if older else roundings), found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel", [f"fsp_{way}LNS_4ModeE{mode}" for way in ("forwardIf", "backwardIf") for mode in (1, 2)]
)
def test_windows_are_loaded_before_they_are_pooled(architecture, kernel):
    """Features of 16 bits and of float32. Number by number, 8 at once: what is not pooled, windows of 2 and 4
    of several channels, windows of 8; windows of 16: 16. Packs of channels, 4 at once: what is not pooled,
    windows of 2 and 4; windows of 8: 8; of 16: 8, twice. Packs of positions, and other windows in both: 4.
    """
    found = collections.Counter(loads_at_once(kernel, architecture))
    most = sum(times for loads, times in found.items() if loads >= 16)
    assert found[4] >= 2 * (4 + 2) and found[8] >= 2 * (4 + 3) and most >= 2, found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel, types", [("fsp_poolIf", 2), ("fsp_poolId", 3)])
def test_windows_are_loaded_before_they_are_pooled_apart(architecture, kernel, types):
    """Windows of 2, 4, 8 and 16 numbers, and others: never one number at a time. Some 16 of float64 in two
    parts, and of 16 numbers ptxas waits once after 14 on sm_100.
    """
    found = collections.Counter(loads_at_once(kernel, architecture))
    cut = found[14]
    assert found[2] == types + cut and found[4] == 2 * types and not found[1], found
    assert found[8] >= types and found[16] + cut >= 2 and cut <= (architecture.startswith("sm_100")), found
