"""The losses on a GPU: groups that the benchmarks add where there is one.

Each is measured by one clock, called so in the results:

- ``wall``: calls one after the other, and the device waited for at the end: what a user feels, the host's
  work included;
- ``graph``: calls captured in a CUDA graph and replayed: the device's time alone, with inputs in its cache if
  they fit;
- ``cold``: the same, each call on a copy of the inputs of its own, so many that together they are four
  times as large as the cache.

Without a GPU an ordinary run calls the same code on a CPU, by the wall clock, so that it goes on working.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastkd
from speed.cases import BOTH, NCHW, NHWC, Case, features
from speed.formulas import FORMULAS
from speed.gpu_clock import Captured, timed
from speed.measure import Row, both_passes
from speed.rows import (
    COMPILED,
    EXACT,
    FLOOR,
    FORMULA_TOLERANCE,
    FUSED,
    TOLERANCE,
    TUNED,
    available_backends,
    traffic,
)
from speed.stock import Stock

WALL, GRAPH, COLD = "wall", "graph", "cold"
CAPTURED = 10  # calls of a graph with hot inputs
CHAINS = ("resnet20-128", "wrn40_2-128", "resnet32x4-128")
LARGE = "resnet50-64"
MM = "torch.mm 4096"


@dataclass(frozen=True)
class GPUCase(Case):
    """A case on a device, by one clock. ``matmul``: the precision of float32 products, for the formula and
    for fastkd alike.
    """

    device: str = "cuda"
    clock: str = WALL
    matmul: str = "ieee"

    @property
    def id(self) -> str:
        matmul = f" {self.matmul}" if self.operation == "fsp" and self.dtype == "float32" else ""
        return f"{self.device} {super().id}{matmul} {self.clock}"

    def bytes_moved(self) -> int:
        """Inputs read, and for the gradient the student's read again and its gradient written: a GPU has no
        cache to keep a sample in.
        """
        passes = 4 if self.direction == BOTH else 2
        return passes * self.values() * getattr(torch, self.dtype).itemsize


def cases(operation: str, full: bool) -> list[GPUCase]:
    """The cases of an operation on a GPU; without one, and not ``full``, one on the CPU."""
    there = torch.cuda.is_available()
    if full and not there:
        return []
    if not full:
        device = "cuda" if there else "cpu"
        return [
            GPUCase(operation, "small", dtype, device=device, clock=clock)
            for dtype in ("float32", "bfloat16")
            for clock in ((WALL, GRAPH, COLD) if there else (WALL,))
        ]
    made = [GPUCase(operation, shape, clock=clock) for shape in CHAINS for clock in (WALL, GRAPH, COLD)]
    if operation == "attention":
        large = itertools.product(("float32", "bfloat16"), (NCHW, NHWC))
        made += [GPUCase(operation, LARGE, dtype, layout, clock=COLD) for dtype, layout in large]
        return [*made, GPUCase(operation, "tiny-2")]
    large_products = (("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "ieee"))
    return made + [
        GPUCase(operation, LARGE, dtype, clock=COLD, matmul=matmul) for dtype, matmul in large_products
    ]


@contextmanager
def products(precision: str) -> Iterator[None]:
    """PyTorch's own precision of float32 products on a GPU."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class GPURows:
    """Tensors, exact results and compiled functions of the cases that share their inputs."""

    def __init__(self, case: GPUCase, full: bool):
        self.full = full
        self.device = torch.device(case.device)
        students, teachers = features(case)
        self.inputs = [
            (
                [x.detach().to(self.device).requires_grad_() for x in students],
                [x.to(self.device) for x in teachers],
            )
        ]
        torch._dynamo.reset()
        self.compiled = torch.compile(
            FORMULAS[case.operation], fullgraph=True, dynamic=False, backend="inductor" if full else "eager"
        )
        wide = [x.detach().double().requires_grad_() for x in self.inputs[0][0]]
        loss = EXACT[case.operation](wide, [x.double() for x in self.inputs[0][1]])
        self.exact = loss.item(), [x.cpu() for x in torch.autograd.grad(loss, wide)]
        size = 4096 if full else 16
        self.square = [
            torch.randn(size, size, device=self.device).to(getattr(torch, case.dtype)) for _ in range(2)
        ]

    def copies(self, case: GPUCase) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The inputs, as often as the clock wants them."""
        if case.clock != COLD:
            return self.inputs * (CAPTURED if case.clock == GRAPH else 1)
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        once = 2 * case.values() * getattr(torch, case.dtype).itemsize
        while len(self.inputs) < math.ceil(4 * cache / once):
            students, teachers = self.inputs[0]
            self.inputs.append(
                ([x.detach().clone().requires_grad_() for x in students], [x.clone() for x in teachers])
            )
        return self.inputs[: math.ceil(4 * cache / once)]

    def row(self, case: GPUCase, name: str) -> Row:
        backend = name if name not in (FLOOR, MM, TUNED, COMPILED) else None

        @contextmanager
        def context() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(products(case.matmul))
                if backend:
                    stack.enter_context(fastkd.use_backend(backend))
                yield

        if name == MM:
            runs: list[Callable[[], Any]] = [lambda: torch.mm(*self.square)]
        elif name == FLOOR:
            runs = [self._floor(*pair) for pair in self.copies(case)]
        else:
            loss = (
                FUSED[case.operation]
                if backend
                else self.compiled
                if name == COMPILED
                else FORMULAS[case.operation]
            )
            runs = [both_passes(functools.partial(loss, *pair), pair[0]) for pair in self.copies(case)]
        tolerance = None if name in (FLOOR, MM) else (TOLERANCE if backend else FORMULA_TOLERANCE)[case.dtype]
        if tolerance and case.matmul == "tf32":
            tolerance = 1e-2
        if case.clock == WALL:

            def turn(calls: int, warm: bool, clock: str) -> float:
                with context():
                    return timed(runs[0], calls, warm, case.device)

            return Row(name, runs[0], context, tolerance, turn)
        return Row(name, runs[0], context, tolerance, Captured(runs, context).turn)

    @staticmethod
    def _floor(students: list[Tensor], teachers: list[Tensor]) -> Callable[[], Any]:
        """A plain pass that reads student and teacher and writes as much as one of them."""
        triples = [(s.detach(), t, torch.empty_like(t)) for s, t in zip(students, teachers, strict=True)]
        return lambda: [torch.add(s, t, out=out) for s, t, out in triples]

    def check(self, row: Row) -> None:
        """Run the row once: errors and peak memory go into ``facts``, a wrong result into ``failed``."""
        students = self.inputs[0][0]
        for x in students:
            x.grad = None
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        with row.context():
            value = row.run()
        if row.tolerance is None:
            return
        if on_gpu:
            gradient_bytes = sum(x.grad.nbytes for x in students if x.grad is not None)
            row.facts["extra_memory"] = max(torch.cuda.max_memory_allocated() - before - gradient_bytes, 0)
        loss, gradients = self.exact
        errors = {"loss": abs(float(value.detach()) - loss) / abs(loss), "gradient": 0.0}
        for x, exact in zip(students, gradients, strict=True):
            off = (
                float((x.grad.double().cpu() - exact).abs().max() / exact.abs().max())
                if x.grad is not None
                else math.inf
            )
            errors["gradient"] = max(errors["gradient"], off)
        row.facts["error"] = errors
        wrong = {what: error for what, error in errors.items() if not error <= row.tolerance}
        if wrong:
            row.failed = f"wrong: relative error {wrong}, at most {row.tolerance} allowed"


class GPUGroup:
    """A case on a GPU as the session sees a group."""

    labels: tuple[str, ...] = ("device",)

    def __init__(self, case: GPUCase, full: bool):
        self.case, self.full, self.id = case, full, case.id
        self.shared = (case.device, *case.inputs)

    def names(self, one_thread: bool) -> list[str]:
        names = [FLOOR, *([MM] if self.case.operation == "fsp" else []), TUNED, COMPILED]
        return names + available_backends(self.case.operation, self.case.device, self.full)

    def build(self, stock: Stock) -> GPURows:
        return GPURows(self.case, self.full)

    def row(self, built: GPURows, name: str) -> Row:
        return built.row(self.case, name)

    def check(self, built: GPURows, row: Row) -> None:
        built.check(row)

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        case, seconds = self.case, median(rows[name].seconds)
        medians = {other: median(row.seconds) for other, row in rows.items() if row.seconds}
        facts: dict[str, Any] = {"milliseconds": 1e3 * seconds, **rows[name].facts}
        if name == MM:
            return {**facts, "gflop_per_s": 2 * 4096**3 / seconds / 1e9}
        facts |= traffic(case, name, seconds, medians)
        if case.flops() and name != FLOOR:
            facts["gflop_per_s"] = case.flops() / seconds / 1e9
        for other in (TUNED, COMPILED):
            if other in medians and name not in (other, FLOOR):
                facts[f"speedup over {other}"] = medians[other] / seconds
        return facts

    def describe(self) -> dict[str, Any]:
        case = self.case
        facts: dict[str, Any] = {
            "device": case.device,
            "clock": case.clock,
            "matmul": case.matmul,
            "operation": case.operation,
            "shape": case.shape,
        }
        facts |= {
            "dtype": case.dtype,
            "layout": case.layout,
            "direction": case.direction,
            "upstream": case.upstream,
        }
        facts |= {"bytes": case.bytes_moved(), "memory_unit": case.unit_of_memory()}
        return {**facts, "flops": case.flops()} if case.flops() else facts
