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

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from fastkd import errors, kernels, native

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


_recorded: list[Call] | None = None


class Call(NamedTuple):
    """What :func:`choose` was asked, to ask it again for a batch of another size, or as for a compiled graph."""

    operation: str
    arguments: tuple[object, ...]
    why_not_cuda: Callable[[], str]

    def backend(self, batch: int, compiled: bool) -> str:
        """The backend that would serve the call if its tensors had ``batch`` samples, in a compiled graph or not."""
        if compiled and current() == "auto":
            return "reference"
        return choose(self.operation, tuple(_resized(argument, batch) for argument in self.arguments), self.why_not_cuda)


def _resized(argument: object, batch: int) -> object:
    if isinstance(argument, (list, tuple)):
        return [_resized(x, batch) for x in argument]
    return argument[:1].expand(batch, *argument.shape[1:]) if isinstance(argument, torch.Tensor) else argument


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """The calls of the package's operations that are made inside, in this process."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


# Private, and without public counterparts; without them such a call ends in an error of PyTorch's. Batched
# gradients of torch.autograd go through an older vmap, of which only its tensors tell.
_in_torch_func: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_in_older_vmap: Callable[..., bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)


def _transforming() -> bool:
    return _in_torch_func() or forward_ad._current_level >= 0


def transforming() -> bool:
    """Whether torch.func or forward mode AD is at work: neither can look into a compiled operator.

    False while a graph is traced: asking would leave a node in it, and PyTorch caches no graph with such a node.
    """
    return not torch.compiler.is_compiling() and _transforming()


def in_torch_func() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, functionalize, ...) is at work."""
    return _in_torch_func()


def batched(*grads: torch.Tensor | None) -> bool:
    """Whether gradients in a backward pass may stand for several each, as with ``is_grads_batched=True``."""
    for grad in grads:
        if grad is not None and _in_older_vmap(grad):
            return True
    return _in_torch_func()


def has_tangent(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of them carries a derivative of forward mode AD."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def _reference_on_cpu() -> str:
    """FASTKD_BACKEND=reference, which asks for the reference, is not warned."""
    errors.warn_once(f"fastkd serves CPU tensors by its plain PyTorch reference: {native.CPU.reason}")
    return "reference"


def choose(operation: str, arguments: tuple[object, ...], why_not_cuda: Callable[[], str]) -> str:
    """The backend, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``, for a call over ``arguments``, tensors and sequences of them.

    The first tensor's device decides. why_not_cuda: why the CUDA library's kernels do not serve the call, or "".
    """
    if _recorded is not None:
        _recorded.append(Call(operation, arguments, why_not_cuda))
    example = arguments[0]
    if isinstance(example, (list, tuple)) and example:
        example = example[0]
    device = example.device.type if isinstance(example, torch.Tensor) else "cpu"
    name = current()
    if name == "auto":
        # inside a compiled graph the plain formula fuses with its neighbours, which an opaque operator cannot
        if torch.compiler.is_compiling() or _transforming() or is_wrapper(example):
            return "reference"
        if device == "cpu":
            return "cpp" if native.CPU.available else _reference_on_cpu()
        if isinstance(example, torch.Tensor) and device == "cuda":
            return _choose_on_gpu(operation, arguments, example.device.index, why_not_cuda)
        return "reference"
    if name != "reference":
        if is_wrapper(example):
            kind = type(example).__name__
            raise BackendError(f"backend {name!r} was asked for but serves plain tensors only, the first is a {kind}")
        _must_serve(name, device, example, arguments, why_not_cuda)
        if transforming() and (_in_torch_func() or has_tangent(_tensors(arguments))):
            raise BackendError(
                f"backend {name!r} was asked for but cannot serve the call: it has no rules for torch.func "
                f"and forward mode AD; use fastkd.reference.{operation}"
            )
    return name


OLDEST_FOR_TRITON = (8, 0)
"""The oldest compute capability that the Triton kernels are compiled and tested for."""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def has_code(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library with code for ``architectures`` ("sm_80", "compute_90", "sm_90a", ...) runs on a device.

    Machine code serves later devices of its generation, PTX every later device; with an "a" either serves its own device alone, with an "f"
    the later ones of its generation.
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
def _why_no_code(architectures: tuple[str, ...], capability: tuple[int, int]) -> str:
    """Why the CUDA library does not run on such a device, or ""."""
    if has_code(architectures, capability):
        return ""
    return f"the CUDA library has code for {', '.join(architectures) or 'nothing'}, the device is sm_{capability[0]}{capability[1]}"


def _choose_on_gpu(operation: str, arguments: tuple[object, ...], index: int, why_not_cuda: Callable[[], str]) -> str:
    capability = _capability(index)
    no_code = _why_no_code(native.cuda_architectures(), capability) if native.CUDA.available else ""
    in_cuda = native.CUDA.available and not no_code and not why_not_cuda()
    if in_cuda and _faster(operation, arguments) == "cuda":
        return "cuda"
    available, reason = kernels.state()
    if available and capability < OLDEST_FOR_TRITON:
        available, reason = False, f"the device is sm_{capability[0]}{capability[1]}, older than the Triton kernels' sm_80"
        reason += f"; {no_code}" if no_code else ""
    if available and not _not_in_triton(arguments):
        return "triton"
    if in_cuda:
        return "cuda"
    if not available:
        errors.warn_once(f"fastkd serves CUDA tensors by its plain PyTorch reference: {reason}")
    return "reference"


def _must_serve(name: str, device: str, example: object, arguments: tuple[object, ...], why_not_cuda: Callable[[], str]) -> None:
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
    if name == "cuda" and not why and isinstance(example, torch.Tensor) and device == "cuda" and not torch.compiler.is_compiling():
        why = _why_no_code(native.cuda_architectures(), _capability(example.device.index))
    if why:
        raise BackendError(f"backend {name!r} was asked for but cannot serve the call: {why}")
