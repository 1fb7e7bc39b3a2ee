"""Which implementation serves a call, and why.

``auto`` chooses; a backend asked for by name either serves the call or raises :class:`BackendError`. What there is:

| name      | serves                     | what it is                                  |
|-----------|----------------------------|---------------------------------------------|
| reference | every device               | plain PyTorch, :mod:`fastkd.reference`      |
| cpp       | CPU tensors                | the compiled library ``fastkd._C``          |
| triton    | CUDA tensors               | Triton kernels, :mod:`fastkd.kernels`       |
| cuda      | nothing in this version    | CUDA C++ kernels, to come                   |
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
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
        "cuda": (False, _NO_CUDA),
    }


_NO_CUDA = "this version has no kernels for it yet"


def _tensors(arguments: tuple[object, ...]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        for x in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(x, torch.Tensor):
                yield x


def _not_in_triton(in_triton: bool, arguments: tuple[object, ...]) -> str:
    """Why Triton's kernels do not serve a call that lies where they run, or ""."""
    if not in_triton:
        return "this version has no Triton kernels for the operation"
    if any(x.dtype == torch.float64 for x in _tensors(arguments)):
        return "its kernels take float16, bfloat16 and float32, not float64"
    return ""


_warned = False


def _warn_once(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"fastkd serves CUDA tensors by its plain PyTorch reference: {reason}", stacklevel=4)


def choose(*arguments: object, in_triton: bool = False) -> str:
    """The backend, ``"reference"``, ``"cpp"`` or ``"triton"``, for a call over ``arguments``, tensors and sequences of them.

    The first tensor's device decides. in_triton: Triton has kernels for the operation.
    """
    example = arguments[0]
    if isinstance(example, (list, tuple)) and example:
        example = example[0]
    device = example.device.type if isinstance(example, torch.Tensor) else "cpu"
    name = current()
    if name == "auto":
        # inside a compiled graph the plain formula fuses with its neighbours, which an opaque operator cannot
        if torch.compiler.is_compiling():
            return "reference"
        if device == "cpu":
            return "cpp" if native.CPU.available else "reference"
        if device != "cuda" or _not_in_triton(in_triton, arguments):
            return "reference"
        available, reason = kernels.state()
        if not available:
            _warn_once(reason)
        return "triton" if available else "reference"
    if name == "reference":
        return name
    # not availability(), which would look at every backend
    if name == "triton":
        available, reason = kernels.state()
    else:
        available, reason = (native.CPU.available, native.CPU.reason) if name == "cpp" else (False, _NO_CUDA)
    if not available:
        raise BackendError(f"backend {name!r} was asked for but is not available: {reason}")
    if name == "triton":
        # interpreted kernels have no operator in a graph
        wanted = "cpu" if kernels.interpreting() and not torch.compiler.is_compiling() else "cuda"
        why = (
            f"it serves {wanted.upper()} tensors only here, the first is on {device}"
            if device != wanted
            else _not_in_triton(in_triton, arguments)
        )
        if why:
            raise BackendError(f"backend 'triton' was asked for but cannot serve the call: {why}")
    elif device != "cpu":
        assert isinstance(example, torch.Tensor)
        raise BackendError(f"backend 'cpp' was asked for but serves CPU tensors only, the first tensor is on {example.device}")
    return name
