"""Which implementation serves a call, and why.

``auto`` chooses; a backend asked for by name either serves the call or raises :class:`BackendError`. What there is:

| name      | serves                     | what it is                                  |
|-----------|----------------------------|---------------------------------------------|
| reference | every device               | plain PyTorch, :mod:`fastkd.reference`      |
| cpp       | CPU tensors                | the compiled library ``fastkd._C``          |
| triton    | nothing in this version    | Triton kernels, to come                     |
| cuda      | nothing in this version    | CUDA C++ kernels, to come                   |
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fastkd import native

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

_DEFAULT = os.environ.get("FASTKD_BACKEND") or "auto"
_chosen: ContextVar[str] = ContextVar("fastkd_backend", default=_DEFAULT)
# A compiled graph cannot guard on a context variable, but it can on a global: this one follows the use_backend entered or left last.
_traced: str = _DEFAULT


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
    written = "this version has no kernels for it yet: auto serves CUDA tensors by the reference"
    return {
        "reference": (True, "plain PyTorch, every device"),
        "cpp": (native.CPU.available, native.CPU.reason),
        "triton": (False, written),
        "cuda": (False, written),
    }


def choose(example: object) -> str:
    """The backend, ``"reference"`` or ``"cpp"``, for a call whose first argument is ``example``, a tensor or a sequence of them."""
    if isinstance(example, (list, tuple)) and example:
        example = example[0]
    on_cpu = not isinstance(example, torch.Tensor) or example.device.type == "cpu"
    name = current()
    if name == "auto":
        # inside a compiled graph the plain formula fuses with its neighbours, which an opaque operator cannot
        return "cpp" if on_cpu and native.CPU.available and not torch.compiler.is_compiling() else "reference"
    if name == "reference":
        return name
    available, reason = availability()[name]
    if not available:
        raise BackendError(f"backend {name!r} was asked for but is not available: {reason}")
    if not on_cpu:
        assert isinstance(example, torch.Tensor)
        raise BackendError(f"backend 'cpp' was asked for but serves CPU tensors only, the first tensor is on {example.device}")
    return name
