"""The tests of Triton that benchmarks/gpu.py runs, called only for the kernels that they launch.

See gpu_ahead.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from speed.gpu_plan import ON_DEVICE

TESTS = Path(__file__).resolve().parents[2] / "tests" / "backends"
ELSEWHERE = ("compiled_step", "not_current")  # by inductor, on a second GPU


class OnCPU(TorchFunctionMode):
    """What is to be made on a GPU is made on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        kwargs = {name: "cpu" if _is_cuda(value) else value for name, value in (kwargs or {}).items()}
        return func(*("cpu" if _is_cuda(x) else x for x in args), **kwargs)


def _is_cuda(value: object) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    sys.path.append(str(TESTS))
    import emulated  # of the tests

    vars(emulated)["load"] = lambda: None  # would compile the CUDA library for a CPU
    for path in sorted(TESTS.glob("test_triton*.py")):
        if "_compile" in path.stem:
            continue
        with redirect_stderr(io.StringIO()):  # that the CUDA library serves no tensor here
            module = importlib.import_module(path.stem)
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if not any(word in name for word in ON_DEVICE.split(" or ")) or not name.startswith("test_"):
                continue
            if not any(word in name for word in ELSEWHERE):
                for i, given in enumerate(_parameters(test)):
                    yield f"tests {path.stem} {name} {i}", functools.partial(_run, module, test, given)


def _parameters(test: Callable[..., object]) -> Iterator[dict[str, Any]]:
    """Those of its marks, and in place of fixtures what does nothing."""
    marks = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    fixtures: dict[str, Any] = {"triton": lambda x: x, "launched": [], "monkeypatch": mock.MagicMock()}
    for chosen in itertools.product(*(values for _, values in marks)):
        given = {name: fixtures.get(name, mock.MagicMock()) for name in inspect.signature(test).parameters}
        for (names, _), value in zip(marks, chosen):
            names = [x.strip() for x in names.split(",")] if isinstance(names, str) else list(names)
            given.update(zip(names, [value] if len(names) == 1 else value))
        yield given


def _run(module: Any, test: Callable[..., object], given: dict[str, Any]) -> None:
    """Until it looks at the results, which no kernel has written."""
    with ExitStack() as stack:
        stack.enter_context(suppress(AssertionError))
        stack.enter_context(OnCPU())
        stack.enter_context(mock.patch("torch.cuda.set_sync_debug_mode"))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", lambda: (9, 0)))
        if hasattr(module, "check_captured"):
            stack.enter_context(mock.patch.object(module, "check_captured", lambda step, inputs: step()))
        stack.enter_context(mock.patch("cuda_graphs.check_captured", lambda step, inputs: step()))
        test(**given)
