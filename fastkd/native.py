"""The compiled libraries: found and loaded here, or the reason why not. Nothing is ever compiled at import.

``fastkd/_C.abi3.so`` holds the CPU kernels, ``fastkd/_C_cuda.abi3.so`` the CUDA kernels. The latter loads
only into a CUDA build of PyTorch, with or without a GPU. Both implement operators ``torch.ops.fastkd.*``
through PyTorch's stable ABI.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CPU_PATHS = ("portable", "neon", "avx2", "avx512")
"""The code paths of the CPU library, slowest first. Every processor has the first, aarch64 also "neon", and
x86-64 (unless clang is older than 16) also "avx2" and "avx512".
"""

_MARKER = b"fastkd-build-info:"
# by the status that fastkd_find_cpu_path returns
_LACKS = {
    2: "this processor lacks it",
    3: "it was not built, which takes GCC or clang 16",
    4: "it is for another kind of processor",
}


@dataclass(frozen=True)
class Library:
    """One compiled library: whether it is loaded, why or why not, and its file (None if there is none)."""

    name: str
    available: bool
    reason: str
    path: str | None


def _build_info(path: str | None) -> dict[str, Any]:
    """What a library says it was built with, read from the file so that one that does not load can still
    tell. Empty if it says nothing.
    """
    if path is None:
        return {}
    found = re.search(re.escape(_MARKER) + rb"(\{[^\0]*\})\0", Path(path).read_bytes())
    return json.loads(found.group(1)) if found else {}


def _why_missing(file: Path) -> str:
    """Why there is no such library in the folder that was imported."""
    here = file.parent
    for entry in sys.path:
        installed = Path(entry).resolve() / here.name
        if (installed / file.name).is_file():
            return (
                f"{here} has no compiled library and hides the installed package in {installed}: `pip install"
                " -e .` builds it here"
            )
    install = "pip install -e ." if (here.parent / "setup.py").is_file() else "pip install ."
    return f"{file} is not there: built with FASTKD_BUILD=0, or not yet (`{install}` builds it)"


def _load(name: str) -> Library:
    """Load ``fastkd/<name>.abi3.so`` into this process, or say why that cannot be."""
    file = Path(__file__).parent / f"{name}.abi3.so"
    if not file.is_file():
        return Library(name, False, _why_missing(file), None)
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        built = _build_info(str(file))
        wanted = (
            f"built for torch>={built.get('torch_target', '?')} with"
            f" {built.get('compiler', 'an unknown compiler')}"
        )
        return Library(
            name,
            False,
            f"{file} does not load into torch {torch.__version__}; it was {wanted}:"
            f" {error.__cause__ or error}",
            str(file),
        )
    return Library(name, True, f"loaded {file}", str(file))


def _load_cuda() -> Library:
    if torch.version.cuda is None:
        return Library("_C_cuda", False, f"torch {torch.__version__} is a build without CUDA", None)
    library = _load("_C_cuda")
    why_not = _build_info(CPU.path).get("cuda") if library.path is None else None
    if why_not:
        return Library(library.name, False, f"not built: {why_not}", None)
    return library


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """What the CUDA library has code for, such as ("sm_80", "sm_90", "compute_90"), in nvcc's names."""
    return tuple(_build_info(CUDA.path).get("architectures", ()))


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library with code for ``architectures`` ("sm_80", "compute_90", ...) runs on a device.

    Machine code (sm) runs on later devices of its generation, PTX (compute) on every later device. With the
    suffix "a" either runs on its own device only, with "f" on later devices of its generation.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        suffix = number[-1] if number[-1:] in ("a", "f") else ""
        major, minor = divmod(int(number.rstrip("af")), 10)
        if suffix == "a":
            served = (major, minor) == capability
        elif kind == "sm" or suffix == "f":
            served = major == capability[0] and minor <= capability[1]
        else:
            served = (major, minor) <= capability
        if served:
            return True
    return False


@functools.cache
def why_no_code(architectures: tuple[str, ...], capability: tuple[int, int]) -> str:
    """Why the CUDA library does not run on such a device, or ""."""
    if has_code(architectures, capability):
        return ""
    return (
        f"the CUDA library has code for {', '.join(architectures) or 'nothing'}, the device is"
        f" sm_{capability[0]}{capability[1]}"
    )


def emulate(path: str) -> None:
    """Replace the CUDA library by its kernels compiled for the CPU, for tests: they run slowly, one thread
    after the other.

    ``path``: a library built from csrc/cuda with FASTKD_EMULATE. Raises OSError if it does not load.
    """
    global EMULATED
    torch.ops.load_library(path)
    EMULATED = Library("_C_cuda", True, f"emulated on CPU tensors by {path}", path)


def _functions() -> ctypes.CDLL:
    """The CPU library's plain C functions. Raises RuntimeError, with the reason, if it is not loaded."""
    if CPU.path is None or not CPU.available:
        raise RuntimeError(f"the CPU library is not available: {CPU.reason}")
    functions = ctypes.CDLL(CPU.path)
    functions.fastkd_cpu_path.restype = ctypes.c_char_p
    functions.fastkd_find_cpu_path.argtypes = [ctypes.c_char_p]
    functions.fastkd_set_cpu_path.argtypes = [ctypes.c_char_p]
    return functions


def cpu_path() -> str:
    """The code path that the CPU kernels take now, one of ``CPU_PATHS``. Raises RuntimeError if the library
    is not available.
    """
    # a null pointer if FASTKD_CPU names a path that cannot run here; set_cpu_path("") chooses the best again
    return (_functions().fastkd_cpu_path() or b"").decode()


def set_cpu_path(name: str) -> None:
    """Make the CPU kernels take one code path, in the whole process, from the next call on.

    Raises: ValueError for an unknown name, or one that this processor or this build does not have;
    RuntimeError if the library is not available.
    """
    _check("CPU code path", name or CPU_PATHS[0], CPU_PATHS)  # "" chooses the best again
    status = _functions().fastkd_set_cpu_path(name.encode())
    if status:
        these = ", ".join(map(repr, cpu_paths()))
        raise ValueError(f"CPU code path {name!r} cannot run here: {_LACKS[status]}; these can: {these}")


def cpu_paths() -> list[str]:
    """The code paths that can run here, slowest first. Raises RuntimeError without the library."""
    functions = _functions()
    return [name for name in CPU_PATHS if functions.fastkd_find_cpu_path(name.encode()) == 0]


def _missing_cpu_paths() -> list[str]:
    """The code paths for this kind of processor that cannot run here, and why."""
    functions = _functions()
    found = {name: functions.fastkd_find_cpu_path(name.encode()) for name in CPU_PATHS}
    return [f"{name} ({_LACKS[status]})" for name, status in found.items() if status in (2, 3)]


def amx() -> bool:
    """Whether bfloat16 FSP uses AMX: on the path "avx512", where processor and operating system support it,
    unless switched off.

    Raises: RuntimeError if the library is not available.
    """
    return bool(_functions().fastkd_amx())


def set_amx(wanted: bool) -> None:
    """Use AMX where it is available (the default) or never, in the whole process. Raises RuntimeError if the
    library is not available.
    """
    _functions().fastkd_set_amx(wanted)


MEMORY_PLANS = ("cached", "streamed")
"""How the CPU kernels may write large gradients: in the caches or past them. Both give the same bits."""


def memory_plan() -> str:
    """One of ``MEMORY_PLANS``: what a measurement of some 50 ms found faster here, made now if no large
    gradient asked for it before, or what ``set_memory_plan`` chose. RuntimeError if the library is not
    available.
    """
    return MEMORY_PLANS[_functions().fastkd_memory_plan() - 1]


def set_memory_plan(plan: str | None) -> None:
    """Choose one of ``MEMORY_PLANS`` for the whole process; None lets a measurement choose again.

    Raises: ValueError for another plan, RuntimeError if the library is not available.
    """
    if plan is not None:
        _check("memory plan", plan, MEMORY_PLANS)
    _functions().fastkd_set_memory_plan(0 if plan is None else 1 + MEMORY_PLANS.index(plan))


AHEAD_PLANS = ("fitting", "never", "always")
"""When FSP asks for the next sample's maps: where both fit into the second-level cache, never, always."""


def ahead_plan() -> str:
    """One of ``AHEAD_PLANS``, at first "fitting". RuntimeError if the library is not available."""
    return AHEAD_PLANS[_functions().fastkd_ahead_plan()]


def set_ahead_plan(plan: str) -> None:
    """Choose one of ``AHEAD_PLANS`` for the whole process. Raises as ``set_memory_plan`` does."""
    _check("ahead plan", plan, AHEAD_PLANS)
    _functions().fastkd_set_ahead_plan(AHEAD_PLANS.index(plan))


def _check(what: str, given: str, wanted: Sequence[str]) -> None:
    if given not in wanted:
        raise ValueError(f"{what} is {given!r}, wanted one of {', '.join(map(repr, wanted))}")


def report() -> dict[str, dict[str, Any]]:
    """For ``cpu`` and ``cuda``: available, reason, path, and what the library was built with; for ``cpu`` the
    code paths too.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, library in (("cpu", CPU), ("cuda", CUDA)):
        # "cuda" is in the other library's reason
        facts = {k: v for k, v in _build_info(library.path).items() if k != "cuda"}
        parts[key] = {"available": library.available, "reason": library.reason, "path": library.path, **facts}
    if CPU.available:
        parts["cpu"] |= {
            "code_path": cpu_path(),
            "code_paths": cpu_paths(),
            "amx": amx(),
            "memory": memory_plan(),
            "ahead": ahead_plan(),
            "second_level_cache": f"{_functions().fastkd_second_level_cache() >> 10} KiB",
        }
        if missing := _missing_cpu_paths():
            parts["cpu"]["other_code_paths"] = missing
    return parts


def _force(variable: str, wanted: Sequence[str], choose: Callable[[str], None]) -> None:
    """Apply an environment variable. A value that cannot be had stops the import: none may replace it."""
    value = os.environ.get(variable)
    if value:
        _check(variable, value, wanted)
        if CPU.available:
            choose(value)


def _force_amx(value: str) -> None:
    set_amx(value == "1")
    if value == "1" and not amx():
        raise ValueError(f"FASTKD_AMX is '1', but AMX cannot be had here on the code path {cpu_path()!r}")


CPU = _load("_C")
CUDA = _load_cuda()
EMULATED: Library | None = None  # by emulate()
_force("FASTKD_CPU", CPU_PATHS, set_cpu_path)
_force("FASTKD_AMX", ("0", "1"), _force_amx)
_force("FASTKD_MEMORY", MEMORY_PLANS, set_memory_plan)
_force("FASTKD_AHEAD", AHEAD_PLANS, set_ahead_plan)
