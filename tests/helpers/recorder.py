"""Which implementation ran: a fallback is caught."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastkd import kernels, reference

FUNCTIONS = ("attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss", "tap", "relu_tap")


class Recorder(TorchDispatchMode):
    """Names of the operators that the dispatcher saw: those of fastkd, and the others."""

    # bookkeeping of autograd and of the tests, none of which computes a feature
    harmless = {
        *(
            "aten::detach",
            "aten::alias",
            "aten::view",
            "aten::split_with_sizes",  # views
            "aten::ones_like",
            "aten::_to_copy",
            "aten::empty_like",
            "aten::fill_.Scalar",
        ),
        "aten::_local_scalar_dense",  # the upstream gradient, read on the CPU
    }
    # what Triton's launchers allocate and, of maps alone, straighten
    launching = {
        *(
            "aten::empty.memory_format",
            "aten::new_empty",
            "aten::new_zeros",
            "aten::new_full",
            "aten::clone",
            "aten::unsqueeze",
        ),
        *("aten::squeeze.dim", "aten::transpose.int", "aten::permute"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("fastkd", "fastkd_cuda"):
            self.fused.append(func._schema.name.partition("::")[2])
        else:
            self.others.append(func.name())
        return func(*args, **(kwargs or {}))


def _fell_back(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("fell back to fastkd.reference")


@contextlib.contextmanager
def launches(recorder: Recorder) -> Iterator[None]:
    """Triton's launchers count as operators, and what the interpreter does with tensors does not."""
    from fastkd.kernels.common.launch import Launch

    find, run = kernels.launcher, Launch.__call__

    def launcher(operator):
        recorder.fused.append(operator)
        return find(operator)

    def call(*args):
        with _disable_current_modes():
            return run(*args)

    with mock.patch.object(kernels, "launcher", launcher), mock.patch.object(Launch, "__call__", call):
        yield


@contextlib.contextmanager
def fused_only(also: Sequence[str] = (), backend: str = "cpp") -> Iterator[Recorder]:
    """Inside, an operation outside fastkd's operators (and those of ``also``) is an error."""
    with contextlib.ExitStack() as stack:
        for function in FUNCTIONS:
            stack.enter_context(mock.patch.object(reference, function, _fell_back))
        recorder = Recorder()
        if backend == "triton":
            also = (*also, *Recorder.launching)
            if kernels.interpreting():  # on a GPU the dispatcher is asked while a mode watches
                stack.enter_context(launches(recorder))
        stack.enter_context(recorder)
        yield recorder
    assert recorder.fused, "no operator of fastkd was called"
    strangers = sorted(set(recorder.others) - Recorder.harmless - set(also))
    assert not strangers, f"work was done outside fastkd's operators: {strangers}"
