"""The CUDA library's kernels on a machine without a GPU: run on the CPU, thread by thread
(csrc/cuda/testing/emulate.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastkd import native
from fastkd.io.files import locked

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-g0",
    "-fvisibility=hidden",
    "-DFASTKD_EMULATE",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]


def build() -> Path | None:
    """The emulated library, compiled where its sources or PyTorch are new; None where there are no sources or
    no compiler.
    """
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    folder = ROOT / "csrc" / "cuda"
    if not compiler or not folder.is_dir():
        return None
    sources = [
        *sorted(folder.rglob("*.cu")),
        *sorted(folder.rglob("*.cpp")),
        ROOT / "csrc" / "common" / "tensor.cpp",
    ]
    digest = hashlib.blake2b(f"{torch.__version__} {compiler} {FLAGS}".encode(), digest_size=8)
    for path in sorted([*ROOT.glob("csrc/common/*.*"), *folder.rglob("*.*")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    library = ROOT / "build" / "emulated" / digest.hexdigest() / "_C_emulated.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with locked(library.parent / ".lock"):  # one of pytest's processes compiles, the others wait for it
        if not library.exists():
            compile_to(library, compiler, sources)
    return library


def compile_to(library: Path, compiler: list[str], sources: list[Path]) -> None:
    """Compiles ``sources`` side by side, and renames what was linked to ``library``. Raises RuntimeError."""
    top = Path(torch.__file__).parent
    search = [f"-I{ROOT / 'csrc'}", "-isystem", str(top / "include")]
    objects = library.parent / str(os.getpid())
    objects.mkdir(parents=True, exist_ok=True)

    def run(arguments: list[str]) -> None:
        done = subprocess.run(
            [*compiler, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{done.stdout}")

    made = [str(objects / f"{source.parent.name}-{source.name}.o") for source in sources]
    with ThreadPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ) as pool:
        list(
            pool.map(
                run,
                (
                    [*FLAGS, *search, "-x", "c++", "-c", str(source), "-o", to]
                    for source, to in zip(sources, made)
                ),
            )
        )
    run(["-shared", *made, f"-L{top / 'lib'}", "-ltorch_cpu", "-o", str(objects / library.name)])
    os.replace(objects / library.name, library)
    shutil.rmtree(objects)


def load() -> None:
    """From now on backend "cuda" serves CPU tensors in this process, unless there is a GPU."""
    if torch.cuda.is_available() or native.EMULATED:
        return
    library = build()
    if library is not None:
        native.emulate(str(library))


def backwards(wanted: bool) -> None:
    """Run threads and blocks from the last to the first, where it matters if a barrier is missing."""
    assert native.EMULATED and native.EMULATED.path
    ctypes.CDLL(native.EMULATED.path).fastkd_emulate_reversed(int(wanted))


@contextlib.contextmanager
def stream(handle: int, capturing: bool = False) -> Iterator[None]:
    """Calls inside belong to another stream than 0, on which a CUDA graph is captured or not."""
    assert native.EMULATED and native.EMULATED.path
    library = ctypes.CDLL(native.EMULATED.path)
    library.fastkd_emulate_stream(ctypes.c_void_p(handle), int(capturing))
    try:
        yield
    finally:
        library.fastkd_emulate_stream(None, 0)


def tickets() -> int:
    """The slice of ticket counters that the last call had; 64 and more: it was captured, and this is where
    its first counter is; -1: it had memory of its own.
    """
    assert native.EMULATED and native.EMULATED.path
    return int(ctypes.CDLL(native.EMULATED.path).fastkd_emulate_tickets())


def products() -> int:
    """How often warps multiplied on tensor cores since this was last asked: 16 x 8 x 8, of bfloat16 16 x 8 x
    16.
    """
    assert native.EMULATED and native.EMULATED.path
    library = ctypes.CDLL(native.EMULATED.path)
    library.fastkd_emulate_products.restype = ctypes.c_int64
    return int(library.fastkd_emulate_products())


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Kernels do nothing inside: what is left is the host's work."""
    assert native.EMULATED and native.EMULATED.path
    library = ctypes.CDLL(native.EMULATED.path)
    library.fastkd_emulate_idle(1)
    try:
        yield
    finally:
        library.fastkd_emulate_idle(0)


def launched() -> list[str]:
    """The kernels that were launched since this was last asked."""
    assert native.EMULATED and native.EMULATED.path
    library = ctypes.CDLL(native.EMULATED.path)
    library.fastkd_emulate_launched.restype = ctypes.c_char_p
    return library.fastkd_emulate_launched().decode().split()
