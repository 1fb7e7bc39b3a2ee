"""Which implementation serves a call, and why.

``auto`` chooses; a backend asked for by name either serves the call or raises :class:`BackendError`. What
there is:

| name      | serves                     | what it is                                  |
|-----------|----------------------------|---------------------------------------------|
| reference | every device               | plain PyTorch, :mod:`fastkd.reference`      |
| cpp       | CPU tensors                | the compiled library ``fastkd._C``          |
| triton    | CUDA tensors               | Triton kernels, :mod:`fastkd.kernels`       |
| cuda      | CUDA tensors               | the compiled library ``fastkd._C_cuda``     |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastkd import _in_force, errors, kernels, native
from fastkd._gpu_rule import faster
from fastkd._implementations import BACKENDS, CPP, CUDA, REFERENCE, TRITON, Backend, tensors_in
from fastkd._private import eagerly_transforming, has_tangent, in_torch_func, is_wrapper, transforming
from fastkd.kernels import limits

NAMES = ("auto", "reference", "cpp", "triton", "cuda")

if _in_force.DEFAULT == "triton":
    kernels.state()


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


class UnknownBackendError(BackendError, ValueError):
    """A name that no backend has."""


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise UnknownBackendError(f"{source} is {name!r}, wanted one of {', '.join(map(repr, NAMES))}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the calls inside ``with use_backend(name):`` by that backend, in this thread and async task only.

    It also holds for the backward passes that are started inside, whichever threads autograd runs them in: a
    forward pass that checkpointing repeats is then served by the same backend. For tensors of a GPU this
    needs PyTorch 2.13 or the main thread.

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda". Outside, the environment's ``FASTKD_BACKEND``
            holds, else "auto".

    Raises: BackendError for an unknown name at once, and at the call for a backend that cannot serve it.
    Under ``torch.compile`` the choice is made when a graph is traced; another choice traces another one. CRD
    and RKD each stand in a graph as one operator, which chooses when it runs.
    """
    if _known(name, "use_backend's name") == "triton":
        kernels.state()  # before a graph is traced, which cannot find it out
    with _in_force.put_in_force(name):
        yield


def current() -> str:
    """The name in force here: what ``use_backend`` or ``FASTKD_BACKEND`` said, else "auto"."""
    return _known(_in_force.traced if torch.compiler.is_compiling() else _in_force.here(), "FASTKD_BACKEND")


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


_recorded: list[Call | KernelCall] | None = None
Limits = Callable[[tuple, tuple], str]
"""Why the CUDA library's kernels do not serve a call over ``arguments`` with ``options``, or "" where they
do.
"""


OPAQUE = {"crd_pass": "crd_loss", "rkd_pass": "rkd_loss"}
"""Operations that stand in a graph as one operator, which chooses when it runs, by the function of each."""


class Call(NamedTuple):
    """The arguments of a call of :func:`select`, to repeat it for another batch size or a compiled graph. Of
    each tensor one number is kept, expanded to the shape of one sample.
    """

    operation: str
    arguments: tuple[object, ...]
    cuda_limits: Limits
    options: tuple[object, ...]

    def backend(self, batch: int, compiled: bool) -> str:
        """The backend that would serve the call with ``batch`` samples, in a compiled graph or not."""
        if compiled and self.operation not in OPAQUE and current() == "auto":
            return "reference"
        return select(self.operation, _resized(self.arguments, batch), self.cuda_limits, self.options).name


class KernelCall:
    """A call that the CPU library's kernels served, of an operation that has no other kernels."""

    def backend(self, batch: int, compiled: bool) -> str:
        """As :meth:`Call.backend`."""
        return "reference" if compiled and current() == "auto" else "cpp"


def record_kernel_call() -> None:
    """Adds one to the calls that :func:`record_calls` gives."""
    if _recorded is not None:
        _recorded.append(KernelCall())


def _resized(argument: Any, batch: int) -> Any:
    """``argument`` with each tensor as one of ``batch`` samples that keeps no other memory and no graph."""
    if isinstance(argument, (list, tuple)):
        return tuple(_resized(x, batch) for x in argument)
    if not isinstance(argument, Tensor):
        return argument
    if is_wrapper(argument):  # which alone decides, and may not be expanded
        return argument.detach()
    shape = (batch, *argument.shape[1:]) if argument.dim() else ()
    return argument.detach().new_empty(()).expand(shape)


@contextmanager
def record_calls() -> Iterator[list[Call | KernelCall]]:
    """Gives a list to which each call of fastkd's operations inside is added, whichever thread makes it."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def select(
    operation: str, arguments: tuple[object, ...], cuda_limits: Limits, options: tuple[object, ...] = ()
) -> Backend:
    """The backend that serves a call over ``arguments``, tensors and sequences of them. The first tensor's
    device decides.

    Raises: BackendError where a backend was asked for by name and cannot serve the call.
    """
    if _recorded is not None:
        _recorded.append(Call(operation, _resized(arguments, 1), cuda_limits, options))
    first = arguments[0]
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    compiling = torch.compiler.is_compiling()
    name = _in_force.traced if compiling else _in_force.here()
    if name == "auto":
        # inside a compiled graph the plain formula fuses with its neighbours, which an opaque operator cannot
        if compiling or eagerly_transforming() or is_wrapper(first):
            return REFERENCE
        if not isinstance(first, Tensor) or first.is_cpu:
            return CPP if native.CPU.available else _reference_on_cpu()
        device = first.device
        if device.type != "cuda":
            return REFERENCE
        return _select_on_gpu(operation, arguments, options, device.index, cuda_limits(arguments, options))
    if _known(name, "FASTKD_BACKEND") != "reference":
        why_not = cuda_limits(arguments, options) if name == "cuda" else ""
        if name == "triton":
            why_not = limits.why_not(operation, arguments, tensors_in(arguments), options)
        _must_serve(name, operation, first, arguments, why_not)
    return BACKENDS[name]


def _reference_on_cpu() -> Backend:
    """FASTKD_BACKEND=reference, which asks for the reference, is not warned."""
    errors.warn_once(f"fastkd serves CPU tensors by its plain PyTorch reference: {native.CPU.reason}")
    return REFERENCE


OLDEST_FOR_TRITON = (8, 0)
"""The oldest compute capability that the Triton kernels are compiled and tested for."""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _select_on_gpu(operation: str, arguments: tuple, options: tuple, index: int, not_in_cuda: str) -> Backend:
    capability = _capability(index)
    no_code = native.why_no_code(native.cuda_architectures(), capability) if native.CUDA.available else ""
    in_cuda = native.CUDA.available and not no_code and not not_in_cuda
    if in_cuda and faster(operation, arguments) is CUDA:
        return CUDA
    available, reason = kernels.state()
    if available and capability < OLDEST_FOR_TRITON:
        available = False
        reason = f"the device is sm_{capability[0]}{capability[1]}, older than the Triton kernels' sm_80"
        reason += f"; {no_code}" if no_code else ""
    if available and not limits.why_not(operation, arguments, tensors_in(arguments), options):
        return TRITON
    if in_cuda:
        return CUDA
    if not available:
        errors.warn_once(f"fastkd serves CUDA tensors by its plain PyTorch reference: {reason}")
    return REFERENCE


def _must_serve(name: str, operation: str, first: object, arguments: tuple, why: str) -> None:
    """Raises BackendError where a backend that was asked for by name cannot serve the call. ``why``: the
    reason that its kernels have against it, or "".
    """

    def refuse(why: str) -> NoReturn:
        raise BackendError(f"backend {name!r} was asked for but {why}")

    if is_wrapper(first):
        refuse(f"serves plain tensors only, the first is a {type(first).__name__}")
    # not availability(), which would look at every backend, and for the CUDA library ask the driver; a CUDA
    # tensor says that there is a GPU
    if name == "triton":
        available, reason = kernels.state()
    else:
        library = native.CPU if name == "cpp" else native.EMULATED or native.CUDA
        available, reason = library.available, library.reason
    if not available:
        refuse(f"is not available: {reason}")
    device = first.device.type if isinstance(first, Tensor) else "cpu"
    wanted = "cpu" if name == "cpp" else "cuda"
    # interpreted kernels have no operator in a graph
    if (name == "triton" and kernels.interpreting() and not torch.compiler.is_compiling()) or (
        name == "cuda" and native.EMULATED
    ):
        wanted = "cpu"
    if device != wanted:
        refuse(f"serves {wanted.upper()} tensors only here, the first is on {device}")
    if (
        name == "cuda"
        and not why
        and isinstance(first, Tensor)
        and device == "cuda"
        and not torch.compiler.is_compiling()
    ):
        why = native.why_no_code(native.cuda_architectures(), _capability(first.device.index))
    if why:
        refuse(f"cannot serve the call: {why}")
    if transforming() and (in_torch_func() or has_tangent(tensors_in(arguments))):
        refuse(
            "cannot serve the call: it has no rules for torch.func and forward mode AD; use"
            f" fastkd.reference.{OPAQUE.get(operation, operation)}"
        )
