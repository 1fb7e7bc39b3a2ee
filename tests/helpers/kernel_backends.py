"""The backends with kernels as parameters of tests, skipped where they are missing."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable

import emulated
import pytest
import torch
from inputs import DTYPES, name, place

import fastkd
from fastkd import kernels

if kernels.interpreting():
    import interpreter  # needs numpy

    interpreter.mend()
emulated.load()


@functools.cache
def missing(backend: str) -> str:
    """Why the kernels of a backend cannot run, or "".

    "" too where the first call fails: that backend's own tests then say so, and those of the other backends
    still run.
    """
    try:
        with fastkd.use_backend(backend):
            fastkd.attention_map(place(torch.ones(1, 1, 1), backend))
    except fastkd.BackendError as error:
        return str(error)
    except Exception as error:
        print(
            f"fastkd: the first kernel of backend {backend!r} fails: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
    return ""


def gpu(test: Callable) -> Callable:
    """Marks a test that needs a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def cpp_missing() -> str:
    return missing("cpp")


def _param(backend: str, *rest: object) -> object:
    why = missing(backend)
    marks = [
        pytest.mark.skipif(bool(why), reason=why),
        *([pytest.mark.gpu] if backend != "cpp" and torch.cuda.is_available() else []),
    ]
    return pytest.param(backend, *rest, id="-".join(map(name, (backend, *rest))), marks=marks)


KERNELS = [_param(backend) for backend in ("cpp", "triton", "cuda")]
"""The backends with kernels of the operations, for ``parametrize("backend", ...)``."""
KERNEL_DTYPES = [
    _param(backend, dtype)
    for backend in ("cpp", "triton", "cuda")
    for dtype in DTYPES
    if (backend, dtype) != ("triton", torch.float64)
]
"""For ``parametrize("backend, dtype", ...)``: what each serves."""
KERNEL_SAMPLES = [*KERNEL_DTYPES[:4], _param("triton", None), _param("cuda", None)]
"""The same for large grids: what is interpreted takes long, and draws a dtype in each test (``drawn``)."""


def drawn(backend: str, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or random.choice(dtypes(backend))


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What a backend serves."""
    return DTYPES[:3] if backend == "triton" else DTYPES
