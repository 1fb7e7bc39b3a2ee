"""Run by test_triton_compile.py in a process of its own: the launchers, as a user calls them, on a GPU that
is not there.

A stand-in for Triton's driver says which GPU there is and swallows launches. So every kernel is compiled for
it with the very signature, constants, alignments and options that a launcher would use there; what ptxas and
cuobjdump say of the result goes to stdout as JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_cases import CASES, FEW
from triton_expected import COPIES
from triton_vector_cases import CASES as VECTORS

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may use


class Utils:
    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    @staticmethod
    def unload_module(module: int) -> None:
        pass

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[90], "multiprocessor_count": 132}


class Driver:
    """As much of a Triton driver as launching takes."""

    utils = Utils()

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: list[tuple[Any, tuple]] = []  # compiled source, arguments of the kernel

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: self.launches.append((src, args))


def cuobjdump(kernel: Any, *flags: str) -> str:
    """What NVIDIA's tool, of Triton's wheel, says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *flags, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: Any) -> dict[str, int]:
    """What a compiled kernel uses: REG, STACK, SHARED, LOCAL."""
    found = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", cuobjdump(kernel, "-res-usage"))
    return {name: int(value) for name, value in found}


def machine_copies(kernel: Any) -> int:
    """As `copies`, of the machine code that ptxas has made of the PTX, which is read where that has some."""
    return copies(kernel.asm["ptx"]) and len(re.findall(r"\bLDGSTS\b", cuobjdump(kernel, "-sass")))


def copies(ptx: str) -> int:
    """How many instructions of a kernel's PTX copy to shared memory while others go on: pipelined loads."""
    return len(re.findall(r"\bcp\.async\.c[ag]\.shared", ptx))


def accesses(ptx: str) -> dict[str, int]:
    """How often a kernel's PTX reads and writes global memory, by bits an access: {"ld 128": 4, ...}; "copy":
    to shared memory.
    """
    found: dict[str, int] = {}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfu](\d+)", ptx):
        name = f"{kind} {int(vector or 1) * int(bits)}"
        found[name] = found.get(name, 0) + 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global .*?\], \[.*?\], (\w+)", ptx):
        name = f"copy {8 * int(size, 0)}"
        found[name] = found.get(name, 0) + 1
    return found


def given_up_first(ptx: str) -> int:
    """How many reads of 16 bytes the second-level cache gives up first, by a policy operand."""
    first = set(re.findall(r"createpolicy\.fractional\.L2::evict_first\.b64 (%\w+)", ptx))
    hinted = re.findall(r"\bld\.global[\w.:]*\.L2::cache_hint\.v4\.\w+ .*?\], (%\w+);", ptx)
    return sum(policy in first for policy in hinted)


def products(ptx: str) -> dict[str, int]:
    """How often a kernel's PTX uses tensor cores, by the types multiplied: {"wgmma tf32": 8, ...}."""
    found: dict[str, int] = {}
    for kind, rest in re.findall(r"\b(wgmma|mma|tcgen05)\.(?:mma_async|sync|mma)([\w.:]+)", ptx):
        if dtype := re.search(r"\b(tf32|bf16|f16)\b", rest):
            name = f"{kind} {dtype[1]}"
            found[name] = found.get(name, 0) + 1
    return found


def work(kernel: Any) -> list[int]:
    """How many multiplications a kernel's products need, and how many its warps make by tensor cores: more,
    if some make the same ones.

    Of each product once, wherever a loop repeats it. Those of tcgen05 (sm_100) do not say their sizes and are
    not counted.
    """
    operand = r"(?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x"
    dots = re.findall(
        rf"(?:tt\.dot|ttng\.warp_group_dot) .*?: {operand}.*? \* {operand}", kernel.asm["ttgir"]
    )
    ptx, warps = kernel.asm["ptx"], kernel.metadata.num_warps
    single = re.findall(r"\bmma\.sync[\w.]*?\.m(\d+)n(\d+)k(\d+)", ptx)
    joined = re.findall(r"\bwgmma\.mma_async[\w.]*?\.m(\d+)n(\d+)k(\d+)", ptx)
    made = sum(math.prod(map(int, size)) * warps for size in single)
    made += sum(math.prod(map(int, size)) * warps // 4 for size in joined)
    return [sum(int(m) * int(k) * int(n) for m, k, _, n in dots), made]


def tickets(ptx: str) -> list[str]:
    """The atomic additions of a kernel, each between the barriers right before and after it."""
    order = re.findall(r"(bar\.sync|(?<=\s)atom\.global[\w.]*)", ptx)
    found = []
    for i, word in enumerate(order):
        if word.startswith("atom"):
            found += [w.split(".")[0] for w in order[i - 1 : i]]
            found += ["atom." + ".".join(part for part in ("acq_rel", "gpu") if part in word.split("."))]
            found += [w.split(".")[0] for w in order[i + 1 : i + 2]]
    return found


def contracted(ptx: str) -> dict[str, int]:
    """How many fused multiplications and additions of numbers a kernel has, by their type."""
    return {dtype: len(re.findall(rf"\bfma\.rn(?:\.\w+)*\.{dtype}", ptx)) for dtype in ("f32", "f64")}


def unguarded(ptx: str) -> int:
    """How many writes to global memory come after a read past the nearest cache, of what other programs
    wrote, with no barrier between.

    What is added up by shuffles before it is written is something else than what was read, in another place.
    """
    found, read = 0, False
    for word in re.findall(r"bar\.sync|shfl\.sync|ld\.global\.cg|st\.global", ptx):
        found += read and word == "st.global"
        read = word == "ld.global.cg" or (read and word == "st.global")
    return found


def report(capability: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What is said of each case's kernels, in a process that has compiled for no other capability."""
    stand_in = Driver(capability)
    driver.set_active(stand_in)
    compiled: list[Any] = []
    original = triton.runtime.jit.JITFunction._do_compile

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        compiled.append(kernel)
        return kernel

    triton.runtime.jit.JITFunction._do_compile = keep
    found = []
    every = CASES | VECTORS
    for name in names:
        compiled.clear()
        stand_in.launches.clear()
        every[name]()
        first = list(stand_in.launches)
        # the second call of each launcher goes past the binder: to the same kernels with the same arguments
        count = len(compiled)
        every[name]()
        second = stand_in.launches[len(first) :]
        same = [
            a[0] is b[0] and len(a[1]) == len(b[1]) and a[1][:3] == b[1][:3] for a, b in zip(first, second)
        ]
        found.append(
            {
                "case": name,
                "launches": [src.name for src, _ in first],
                "relaunched": len(first) == len(second) and all(same) and len(compiled) == count,
                "kernels": [
                    {
                        "name": k.name,
                        "capability": capability,
                        "accesses": accesses(k.asm["ptx"]),
                        "given_up_first": given_up_first(k.asm["ptx"]),
                        "tickets": tickets(k.asm["ptx"]),
                        "unguarded": unguarded(k.asm["ptx"]),
                        "contracted": contracted(k.asm["ptx"]),
                        "products": products(k.asm["ptx"]),
                        "work": work(k),
                        "copies": copies(k.asm["ptx"]) if k.name.startswith("fsp") else 0,
                        "machine_copies": machine_copies(k) if name in COPIES and capability < 100 else None,
                        "roundings": k.asm["ptx"].count("cvt.rn.tf32.f32"),
                        "shared": k.metadata.shared,
                        "shared_limit": SHARED[capability],
                        "fp_fusion": k.metadata.enable_fp_fusion,
                        "resources": resources(k),
                    }
                    for k in compiled
                ],
            }
        )
    return found


def main() -> None:
    """``80 few`` or ``90 "fsp cifar bf16"``: some cases; ``90 vectors``: those of embeddings; ``90``: all;
    ``80,90,100``: a line of JSON for each, all cases of features for sm_90 and few for the others.
    """
    os.nice(max(10 - os.nice(0), 0))  # other tests go first
    capabilities, names = sys.argv[1].split(","), sys.argv[2:]
    if len(capabilities) == 1:
        sets = {"few": [*FEW, *VECTORS], "vectors": [*VECTORS], "": [*CASES, *VECTORS]}
        print(json.dumps(report(int(capabilities[0]), sets.get(" ".join(names), names))))
        return
    names = names or list(CASES)
    for capability in capabilities:  # each in a process that is forked from one with everything imported
        child = os.fork()
        if child == 0:
            print(json.dumps(report(int(capability), names if capability == "90" else FEW)))
            return
        if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(status)


if __name__ == "__main__":
    main()
