"""The device of a run, and runs that repeat bit by bit on it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd.errors import UserError
from fastkd.io.console import counted
from fastkd.training import distributed
from fastkd.training.launch import launched


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, or by itself a GPU if there is one. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; wanted cpu or cuda") from None
    if device.type == "cuda" and launched() is not None:
        device = torch.device("cuda", distributed.gpu_index())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees no such GPU here")
    return device


def can_compile(device: torch.device) -> bool:
    """Whether what ``torch.compile`` needs is there: Triton for a GPU, and a C++ compiler."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    return shutil.which(os.environ.get("CXX", "g++")) is not None


BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
"""A processor's features, as Linux calls them, with which bfloat16 networks train faster than float32 ones.
"""


def fast_bfloat16(device: torch.device) -> bool | None:
    """Whether ``device`` has instructions for bfloat16: without them it is emulated, slower than float32.
    None: not known.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = processor_features()
    return not features.isdisjoint(BFLOAT16_FLAGS) if features else None


def processor_features() -> set[str]:
    """The first processor's features as Linux lists them for x86-64; none where there is no such list."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
    )


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms while a run lasts. Raises UserError where an operation has none."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        memory.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory = False, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"--deterministic: {str(error).split('.')[0]}") from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory = before[1:]
