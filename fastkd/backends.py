"""Which implementation serves a call, and why.

``auto`` chooses; a backend asked for by name either serves the call or raises :class:`BackendError`. What there is:

| name      | serves                     | what it is                                  |
|-----------|----------------------------|---------------------------------------------|
| reference | every device               | plain PyTorch, :mod:`fastkd.reference`      |
| cpp       | CPU tensors                | the compiled library ``fastkd._C``          |
| triton    | CUDA tensors               | Triton kernels, :mod:`fastkd.kernels`       |
| cuda      | CUDA tensors               | the compiled library ``fastkd._C_cuda``     |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fastkd import kernels, native

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

_DEFAULT = os.environ.get("FASTKD_BACKEND") or "auto"
_chosen: ContextVar[str] = ContextVar("fastkd_backend", default=_DEFAULT)
# A compiled graph cannot guard on a context variable, but it can on a global: this one follows the use_backend entered or left last.
_traced: str = _DEFAULT
if _DEFAULT == "triton":
    kernels.state()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class UnknownBackendError(BackendError, ValueError):
    """A name that is no backend's."""


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise UnknownBackendError(f"{source} is {name!r}, wanted one of {', '.join(map(repr, NAMES))}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the calls inside ``with use_backend(name):`` by that backend, in this thread and async task only.

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda". Outside, the environment's ``FASTKD_BACKEND`` holds, else "auto".

    Raises: BackendError for an unknown name at once, and at the call for a backend that cannot serve it.
    Under ``torch.compile`` the choice is taken when a graph is traced, and another choice traces another graph.
    """
    global _traced
    token = _chosen.set(_known(name, "use_backend's name"))
    if name == "triton":
        kernels.state()  # before a graph is traced, which cannot find it out
    _traced = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _traced = _chosen.get()


def current() -> str:
    """The name in force here: what ``use_backend`` or ``FASTKD_BACKEND`` said, else "auto"."""
    return _known(_traced if torch.compiler.is_compiling() else _chosen.get(), "FASTKD_BACKEND")


def availability() -> dict[str, tuple[bool, str]]:
    """For each backend but ``auto``: whether it can serve here, and the reason."""
    return {
        "reference": (True, "plain PyTorch, every device"),
        "cpp": (native.CPU.available, native.CPU.reason),
        "triton": kernels.state(),
        "cuda": _cuda_state(),
    }


def _cuda_state() -> tuple[bool, str]:
    if native.EMULATED:
        return True, native.EMULATED.reason
    if not native.CUDA.available:
        return False, f"the CUDA library is not there: {native.CUDA.reason}"
    if not torch.cuda.is_available():
        return False, "the CUDA library is loaded, but PyTorch sees no CUDA device"
    return True, f"the CUDA library, on {torch.cuda.get_device_name()}"


def _tensors(arguments: tuple[object, ...]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        for x in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(x, torch.Tensor):
                yield x


def _not_in_triton(arguments: tuple[object, ...]) -> str:
    """Why Triton's kernels do not serve a call that lies where they run, or ""."""
    if any(x.dtype == torch.float64 for x in _tensors(arguments)):
        return "its kernels take float16, bfloat16 and float32, not float64"
    return ""


def is_wrapper(x: object) -> bool:
    """Whether a tensor holds others, as a DTensor does, for which PyTorch has rules for its own operators alone."""
    return type(x) is not torch.Tensor and hasattr(type(x), "__tensor_flatten__")


# What the CUDA library does not serve, and "" where it does. Its kernels check the rest, so misuse is explained as everywhere.

MAX_STAGES = 16
"""Stages whose pointers and sizes go to a kernel by value."""


def why_not_cuda_map(p: object) -> str:
    return "" if p == 2 else f"its kernels take p = 2, not {p}"


def why_not_cuda_loss(student: object, teacher: object, p: object, teacher_is_map: object, student_is_map: object) -> str:
    students, teachers = (list(_tensors((side,))) for side in (student, teacher))
    if len(students) > MAX_STAGES:
        return f"its kernels take up to {MAX_STAGES} stages, not {len(students)}"
    for s, t in zip(students, teachers):
        if s.shape[1 if student_is_map else 2 :] != t.shape[1 if teacher_is_map else 2 :]:
            return "its kernels take student and teacher of equal spatial size"
    return why_not_cuda_map(p)


def why_not_cuda_chain(student: object) -> str:
    stages = len(student) if isinstance(student, (list, tuple)) else 0
    return "" if stages <= MAX_STAGES else f"its kernels take up to {MAX_STAGES} stages, not {stages}"


# The rule of `auto` between the two backends of a GPU, where both serve a call. Nothing of it is measured on one yet.
#
# - Attention maps, losses and taps, by calculation: they move the same bytes in both. What the host does before the driver takes about as
#   long in both (measured on a CPU, benchmarks/host.py), but a forward pass is two launches in Triton and one in C++. So C++.
# - FSP, by calculation: likewise while the host is what a call waits for. Products of many channels are for tensor cores, where Triton
#   emits Hopper's own instructions and takes larger tiles, and keeps no matrix larger than the features; 64 x 64 tiles of the C++ kernels
#   read the ResNet-50 stages six times over. So Triton from LARGE_PRODUCTS multiply-adds on, about 20 us of an H200 in tf32.
# - float64: C++, since Triton has none.
LARGE_PRODUCTS = 1 << 32


def _faster(operation: str, arguments: tuple[object, ...]) -> str:
    if not operation.startswith("fsp"):
        return "cuda"
    first = arguments[0]
    chain = first if isinstance(first, (list, tuple)) else arguments
    work = sum(_products(a, b) for a, b in zip(chain, chain[1:]) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))
    return "cuda" if work < LARGE_PRODUCTS else "triton"


def _products(a: torch.Tensor, b: torch.Tensor) -> int:
    if a.dim() < 3 or b.dim() < 3:
        return 0  # misuse, which will be explained
    return a.shape[0] * a.shape[1] * b.shape[1] * min(a[0, 0].numel(), b[0, 0].numel())


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"fastkd serves CUDA tensors by its plain PyTorch reference: {reason}", stacklevel=4)


def choose(operation: str, arguments: tuple[object, ...], why_not_cuda: Callable[[], str]) -> str:
    """The backend, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``, for a call over ``arguments``, tensors and sequences of them.

    The first tensor's device decides. why_not_cuda: why the CUDA library's kernels do not serve the call, or "".
    """
    example = arguments[0]
    if isinstance(example, (list, tuple)) and example:
        example = example[0]
    device = example.device.type if isinstance(example, torch.Tensor) else "cpu"
    name = current()
    if name == "auto":
        # inside a compiled graph the plain formula fuses with its neighbours, which an opaque operator cannot
        if torch.compiler.is_compiling() or is_wrapper(example):
            return "reference"
        if device == "cpu":
            return "cpp" if native.CPU.available else "reference"
        return _choose_on_gpu(operation, arguments, why_not_cuda) if device == "cuda" else "reference"
    if name != "reference":
        if is_wrapper(example):
            kind = type(example).__name__
            raise BackendError(f"backend {name!r} was asked for but serves plain tensors only, the first is a {kind}")
        _must_serve(name, device, arguments, why_not_cuda)
    return name


def _choose_on_gpu(operation: str, arguments: tuple[object, ...], why_not_cuda: Callable[[], str]) -> str:
    in_cuda = native.CUDA.available and not why_not_cuda()
    if in_cuda and _faster(operation, arguments) == "cuda":
        return "cuda"
    available, reason = kernels.state()
    if available and not _not_in_triton(arguments):
        return "triton"
    if in_cuda:
        return "cuda"
    if not available:
        _warn_once(reason)
    return "reference"


def _must_serve(name: str, device: str, arguments: tuple[object, ...], why_not_cuda: Callable[[], str]) -> None:
    """Raises BackendError where a backend that was asked for by name cannot serve the call."""
    # not availability(), which would look at every backend, and for the CUDA library ask the driver; a CUDA tensor says that there is a GPU
    if name == "triton":
        available, reason = kernels.state()
    else:
        library = native.CPU if name == "cpp" else native.EMULATED or native.CUDA
        available, reason = library.available, library.reason
    if not available:
        raise BackendError(f"backend {name!r} was asked for but is not available: {reason}")
    wanted = "cpu" if name == "cpp" else "cuda"
    # interpreted kernels have no operator in a graph
    if (name == "triton" and kernels.interpreting() and not torch.compiler.is_compiling()) or (name == "cuda" and native.EMULATED):
        wanted = "cpu"
    if device != wanted:
        raise BackendError(f"backend {name!r} was asked for but serves {wanted.upper()} tensors only here, the first is on {device}")
    why = _not_in_triton(arguments) if name == "triton" else why_not_cuda() if name == "cuda" else ""
    if why:
        raise BackendError(f"backend {name!r} was asked for but cannot serve the call: {why}")
