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
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastkd import kernels
from fastkd._bits import ATTENTION, FSP
from fastkd.kernels.fsp.saved import wide_stages

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


def resources(kernel: Any) -> dict[str, int]:
    """What cuobjdump says a compiled kernel uses: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def copies(ptx: str) -> int:
    """How many instructions of a kernel's PTX copy to shared memory while others go on: pipelined loads."""
    return len(re.findall(r"\bcp\.async\.c[ag]\.shared", ptx))


def accesses(ptx: str) -> dict[str, int]:
    """How often a kernel's PTX reads and writes global memory, by bits an access: {"ld 128": 4, ...}; "copy":
    to shared memory.
    """
    found: dict[str, int] = {}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfu](\d+)", ptx):
        name = f"{kind} {int(vector or 1) * int(bits)}"
        found[name] = found.get(name, 0) + 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global .*?\], \[.*?\], (\w+)", ptx):
        name = f"copy {8 * int(size, 0)}"
        found[name] = found.get(name, 0) + 1
    return found


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


def feature(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


OPTIONS = (2.0, "mean", False, 1e-12, "clamp")
AT = dict(channel_reduce="mean", pool="before", student_grad=True)


def transfer(
    student: Any, teacher: Any, p: float = 2.0, eps: float = 1e-12, **options: Any
) -> list[torch.Tensor]:
    """The loss by its launcher; the coefficients."""
    numbers = [0.0, p, eps, 1.0]
    packed = ATTENTION.pack(**AT | options)
    coefficients: list[torch.Tensor] = kernels.launcher("attention_transfer_loss")(
        student, teacher, packed, numbers
    )[1]
    return coefficients


def transfer_backward(wanted: Any, ks: Any, p: float = 2.0, **options: Any) -> None:
    packed = ATTENTION.pack(**AT | options)
    kernels.launcher("attention_transfer_loss_backward")(torch.empty(()), wanted, ks, p, packed)


def loss(
    sizes: list[tuple[int, int]], dtype: torch.dtype, batch: int, channels_last: bool = False, **options: Any
) -> None:
    student, teacher = ([feature((batch, c, s, s), dtype, channels_last) for c, s in sizes] for _ in range(2))
    ks = transfer(student, teacher, **options)
    wanted = student * options.get("student_grad", True) + teacher * options.get("teacher_grad", False)
    options.pop("eps", None)
    transfer_backward(wanted, ks, **options)


def pooled() -> None:
    student, teacher = feature((4, 8, 12, 12), torch.bfloat16), feature((4, 6, 7, 7), torch.float32, True)
    for pool, pool_mode in (("before", "avg"), ("after", "max")):
        ks = transfer([student], [teacher], pool=pool, pool_mode=pool_mode)
        transfer_backward([student], ks, pool=pool, pool_mode=pool_mode)


def unaligned() -> None:
    """The same shapes and strides, once at addresses that are multiples of 16 and once at others."""
    shape = (4, 8, 16, 16)
    for offset in (0, 1):
        x = torch.empty(4 * 8 * 256 + 1)[offset:][: 4 * 8 * 256].view(shape)
        transfer([x], [x])


def maps(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> None:
    x, grad = feature(shape, dtype, channels_last), feature(shape, dtype, channels_last)
    y, norm = kernels.launcher("attention_map")(x, 2.0, "mean", False, True, 1e-12, "clamp")
    kernels.launcher("attention_map_backward")(
        torch.empty_like(y), x, y, norm, 2.0, "mean", False, True, 1e-12, "clamp"
    )
    out, y, norm = kernels.launcher("relu_tap")(x, grad, *OPTIONS)
    kernels.launcher("tap_backward")(grad, torch.empty_like(y), x, y, norm, *OPTIONS)
    kernels.launcher("relu_tap_backward")(grad, torch.empty_like(y), out, y, norm, *OPTIONS)


def fsp(
    student: list[tuple[int, int]],
    dtype: torch.dtype,
    batch: int,
    precision: str | None,
    channels_last: bool = False,
    teacher: list[tuple[int, int]] | None = None,
    pool_mode: str = "avg",
    distance: str = "squared",
) -> None:
    chains = [
        [feature((batch, c, s, s), dtype, channels_last) for c, s in sizes]
        for sizes in (student, teacher or student)
    ]
    options = FSP.pack(pool_mode=pool_mode, distance=distance, precision=precision, with_grad=True)
    _, ms, _ = kernels.launcher("fsp_loss")(*chains, options, [0.0, 1.0])
    stages, others = list(range(len(student))), [chains[1][i] for i in wide_stages(ms)]
    kernels.launcher("fsp_loss_backward")(torch.empty(()), chains[0], ms, options, stages, others)


def fsp_unaligned() -> None:
    for offset in (0, 1):
        x = torch.empty(4 * 16 * 256 + 1)[offset:][: 4 * 16 * 256].view(4, 16, 16, 16)
        a = torch.empty(4, 16, 16, 16)
        kernels.launcher("fsp_loss")([a, x], [a, x], FSP.pack(precision="tf32"), [0.0, 1.0])


def without_gradients() -> None:
    """Of the same tensors, first a loss alone, and then one whose gradients are wanted: what a kernel writes
    is part of it.
    """
    x = [torch.empty(4, 16, 8, 8), torch.empty(4, 16, 8, 8)]
    for student_grad in (False, True):
        options = FSP.pack(precision="tf32", with_grad=student_grad)
        kernels.launcher("fsp_loss")(x, x, options, [0.0, 1.0])
        transfer(x, x, student_grad=student_grad)


def matrix(shape: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    a = feature(shape, dtype)
    options = FSP.pack(precision=precision, a_grad=True, b_grad=True)
    g = kernels.launcher("fsp_matrix")(a, a, options)
    kernels.launcher("fsp_matrix_backward")(g, a, a, options)


CIFAR = [(16, 32), (32, 16), (64, 8)]
RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
RESNET32X4 = [(64, 32), (128, 16), (256, 8)]
# one pair by a matrix, one by products over channels, of several tiles (of 9x9 positions) and parts
WIDE = [(96, 18), (520, 9), (768, 9)]
# the last pair's matrix would be larger than the features
COLUMNS = [(70, 8), (9, 8), (130, 5), (200, 5)]
CASES = {
    "cifar": lambda: loss(CIFAR, torch.float32, 128),
    "cifar channels_last bf16": lambda: loss(CIFAR, torch.bfloat16, 128, True),
    "resnet50": lambda: loss(RESNET50, torch.float32, 8),
    "resnet50 bf16": lambda: loss(RESNET50, torch.bfloat16, 8),
    "resnet50 channels_last": lambda: loss(RESNET50, torch.float32, 8, True),
    "resnet50 channels_last fp16": lambda: loss(RESNET50, torch.float16, 8, True),
    "7x7": lambda: loss([(2048, 7)], torch.float32, 8),
    "7x7 bf16": lambda: loss([(2048, 7)], torch.bfloat16, 8),
    "all switches": lambda: loss(
        [(6, 5), (3, 4)],
        torch.float32,
        2,
        p=2.7,
        signed=True,
        eps_mode="add",
        pool_mode="max",
        difference="l2",
        stage_reduce="mean",
        teacher_grad=True,
    ),
    "p 3, odd": lambda: loss([(7, 5)], torch.bfloat16, 3, p=3.0, teacher_grad=True),
    "p 1.5": lambda: loss([(7, 5)], torch.float16, 3, p=1.5),
    "pooled": pooled,
    "unaligned": unaligned,
    "map": lambda: maps((8, 256, 56, 56), torch.float32),
    "map bf16": lambda: maps((8, 256, 56, 56), torch.bfloat16),
    "map channels_last bf16": lambda: maps((8, 256, 56, 56), torch.bfloat16, True),
    "map of one program": lambda: maps((8, 16, 8, 8), torch.float32),
    "fsp cifar bf16": lambda: fsp(CIFAR, torch.bfloat16, 128, None),
    "fsp cifar tf32x3": lambda: fsp(CIFAR, torch.float32, 128, "tf32x3"),
    "fsp resnet32x4 tf32": lambda: fsp(RESNET32X4, torch.float32, 64, "tf32"),
    "fsp resnet32x4 bf16": lambda: fsp(RESNET32X4, torch.bfloat16, 64, None),
    "fsp resnet50": lambda: fsp(RESNET50, torch.float32, 8, "ieee"),
    "fsp resnet50 tf32": lambda: fsp(RESNET50, torch.float32, 8, "tf32"),
    "fsp resnet50 channels_last bf16": lambda: fsp(RESNET50, torch.bfloat16, 8, None, True),
    "fsp columns": lambda: fsp(COLUMNS, torch.float16, 2, "ieee", distance="column_l2"),
    "fsp resnet50 columns": lambda: fsp(RESNET50, torch.float32, 8, "tf32", distance="column_l2"),
    "fsp again": lambda: fsp(WIDE, torch.float32, 8, "tf32", True, [(96, 18), (520, 12), (768, 6)]),
    "fsp pooled": lambda: fsp(CIFAR, torch.float32, 4, "tf32", False, [(16, 9), (32, 9), (64, 4)], "max"),
    "fsp wide tf32x3": lambda: fsp(WIDE, torch.float32, 8, "tf32x3"),
    "fsp unaligned": fsp_unaligned,
    "fsp without gradients": without_gradients,
    "matrix tf32": lambda: matrix((8, 128, 16, 16), torch.float32, "tf32"),
}

# enough cases to compile every kernel
FEW = (
    "cifar channels_last bf16",
    "7x7 bf16",
    "pooled",
    "map bf16",
    "unaligned",
    "fsp resnet50 tf32",
    "fsp columns",
    "matrix tf32",
    "fsp resnet50 channels_last bf16",
    "fsp resnet32x4 tf32",
    "fsp wide tf32x3",
    "fsp unaligned",
)


def main() -> None:
    os.nice(max(10 - os.nice(0), 0))  # other tests go first
    capability = int(sys.argv[1])
    names = list(FEW) if sys.argv[2:] == ["few"] else sys.argv[2:] or list(CASES)
    stand_in = Driver(capability)
    driver.set_active(stand_in)
    compiled: list[Any] = []
    original = triton.runtime.jit.JITFunction._do_compile

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        compiled.append(kernel)
        return kernel

    triton.runtime.jit.JITFunction._do_compile = keep
    report = []
    for name in names:
        compiled.clear()
        stand_in.launches.clear()
        CASES[name]()
        first = list(stand_in.launches)
        # the second call of each launcher goes past the binder: to the same kernels with the same arguments
        count = len(compiled)
        CASES[name]()
        second = stand_in.launches[len(first) :]
        same = [
            a[0] is b[0] and len(a[1]) == len(b[1]) and a[1][:3] == b[1][:3] for a, b in zip(first, second)
        ]
        report.append(
            {
                "case": name,
                "launches": [src.name for src, _ in first],
                "relaunched": len(first) == len(second) and all(same) and len(compiled) == count,
                "kernels": [
                    {
                        "name": k.name,
                        "capability": capability,
                        "accesses": accesses(k.asm["ptx"]),
                        "tickets": tickets(k.asm["ptx"]),
                        "unguarded": unguarded(k.asm["ptx"]),
                        "products": products(k.asm["ptx"]),
                        "work": work(k),
                        "copies": copies(k.asm["ptx"]) if k.name.startswith("fsp") else 0,
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
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
