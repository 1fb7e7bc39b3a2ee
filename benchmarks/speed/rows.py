"""The rows of a case: what is measured beside what, on which tensors, and whether each of them is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median as middle
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import backends, reference
from speed import formulas
from speed.cases import BOTH, FORWARD, Case, features
from speed.formulas import FORMULAS, call
from speed.measure import Row, peak_memory
from speed.stock import Stock

# Rows by what they are. A backend's row has its name.
FLOOR, STOCK, TUNED, COMPILED = "streaming floor", "eager, stock malloc", "eager", "torch.compile"
BROADCAST, BROADCAST_COMPILED = "eager, broadcast", "torch.compile, broadcast"
MM, BMM, RELU = "torch.mm 1024", "torch.bmm of the products", "torch.relu"
YARDSTICKS = (FLOOR, MM, BMM, RELU)

# The error, relative to the loss or to a gradient's largest element, beyond which a row is wrong and gets no
# speed. What computes in float32 may round once to the gradient's dtype. A formula in bfloat16 may
# be far off; its error stands beside its speed.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-7}
FORMULA_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}

FUSED: dict[str, Callable[..., Tensor]] = {
    "attention": fastkd.attention_transfer_loss,
    "fsp": fastkd.fsp_loss,
}
EXACT: dict[str, Callable[..., Tensor]] = {
    "attention": reference.attention_transfer_loss,
    "fsp": reference.fsp_loss,
}


@functools.cache
def available_backends(operation: str = "attention", device: str = "cpu", full: bool = True) -> list[str]:
    """The compiled backends that serve an operation on the device, or fail at it; ``full``: without
    interpreted ones, whose speed means nothing.
    """
    names = []
    x = [torch.ones(1, 1, 2, 2, device=device)] * 2
    for name, (available, reason) in backends.availability().items():
        if available and name != "reference" and not (full and "interpreted" in reason):
            try:
                with fastkd.use_backend(name):
                    FUSED[operation](x, x)
            except fastkd.BackendError:
                continue
            except Exception:  # its rows say so when they are checked, and the other rows are measured
                pass
            names.append(name)
    return names


def row_names(case: Case, full: bool, one_thread: bool) -> list[str]:
    """Every row of the case, in the order of the table. Compiling costs most: it is done where a goal asks
    for it, and in a few more.
    """
    names = [FLOOR]
    if case.operation == "fsp":
        names += [MM, BMM]
    if case.shape == "tiny-2":
        names = [RELU]
    if case.plain and case.shape != "tiny-2":
        names.append(STOCK)
    names.append(TUNED)
    some = case.plain or (full and case.direction == BOTH and case.shape == "resnet20-128")
    with_one = case.operation == "attention" or case.shape in ("resnet20-64", "small")
    if (full or case.upstream == 1) and some and (not one_thread or with_one):
        names.append(COMPILED)
    if case.operation == "fsp" and case.plain and case.shape in ("resnet20-64", "small"):
        names += [BROADCAST, BROADCAST_COMPILED]
    return names + available_backends(case.operation)


@functools.lru_cache(maxsize=1)
def exact(operation: str, shape: str, dtype: str) -> tuple[float, list[Tensor]]:
    """Loss and the student's gradients by the reference in float64: one for all layouts, since it is the
    slowest of all.
    """
    students, teachers = features(Case(operation, shape, dtype))
    wide = [x.detach().double().requires_grad_() for x in students]
    loss = EXACT[operation](wide, [x.double() for x in teachers])
    return loss.item(), list(torch.autograd.grad(loss, wide))


class Rows:
    """The rows of the cases that share their inputs: tensors, exact results, compiled functions."""

    def __init__(self, case: Case, full: bool, stock: Stock):
        self.inputs, self.full, self.stock = case.inputs, full, stock
        self.students, self.teachers = features(case)
        self.out = [torch.empty_like(x) for x in self.teachers]
        torch._dynamo.reset()  # the compiled functions of other inputs count against its limit
        # in an ordinary run only the tracing is tried: a C++ compiler would take its seconds
        compiled = functools.partial(
            torch.compile, fullgraph=True, dynamic=False, backend="inductor" if full else "eager"
        )
        self.compiled = {False: compiled(FORMULAS[case.operation]), True: compiled(formulas.fsp_broadcast)}
        self.products = self._products(case)
        size = 1024 if full else 16
        self.square = [torch.randn(size, size).to(getattr(torch, case.dtype)) for _ in range(2)]
        self.exact = exact(case.operation, case.shape, case.dtype)

    def row(self, case: Case, name: str) -> Row:
        """The row of this name, ready to run."""
        if name in YARDSTICKS:
            return Row(
                name, getattr(self, {FLOOR: "_floor", MM: "_mm", BMM: "_bmm", RELU: "_relu"}[name])(case)
            )
        formula = FORMULAS[case.operation]
        tolerance = FORMULA_TOLERANCE[case.dtype]
        if name == STOCK:
            return Row(
                name,
                call(formula, case, self.students, self.teachers),
                turn=self.stock.turns(case),
                tolerance=tolerance,
            )
        if name in (TUNED, BROADCAST):
            loss = formulas.fsp_broadcast if name == BROADCAST else formula
        elif name in (COMPILED, BROADCAST_COMPILED):
            loss = self.compiled[name == BROADCAST_COMPILED]
        else:
            context = functools.partial(fastkd.use_backend, name)
            loss, tolerance = FUSED[case.operation], TOLERANCE[case.dtype]
            return Row(name, call(loss, case, self.students, self.teachers), context, tolerance)
        return Row(name, call(loss, case, self.students, self.teachers), tolerance=tolerance)

    def check(self, case: Case, row: Row) -> None:
        """Run the row once: errors and peak memory go into ``facts``, a wrong result into ``failed``."""
        for x in self.students:
            x.grad = None
        with row.context():
            row.run()
            if row.tolerance is None:
                return
            for x in self.students:
                x.grad = None
            values: list[Any] = []
            peak = peak_memory(lambda: values.append(row.run())) if row.turn is None and self.full else None
            value = values[0] if values else row.run()
        loss, gradients = self.exact
        errors = {"loss": abs(float(value.detach()) - case.upstream * loss) / abs(case.upstream * loss)}
        if case.direction == BOTH:
            errors["gradient"] = max(
                self._off(x.grad, case.upstream, exact)
                for x, exact in zip(self.students, gradients, strict=True)
            )
        row.facts["error"] = errors
        if peak is not None:
            gradient_bytes = sum(x.grad.nbytes for x in self.students if x.grad is not None)
            row.facts["extra_memory"] = max(peak - gradient_bytes, 0)
        wrong = {what: error for what, error in errors.items() if not error <= row.tolerance}
        if wrong:
            row.failed = f"wrong: relative error {wrong}, at most {row.tolerance} allowed"

    @staticmethod
    def _off(gradient: Tensor | None, upstream: int, exact: Tensor) -> float:
        if gradient is None:
            return float("inf")
        return float((gradient.double() / upstream - exact).abs().max() / exact.abs().max())

    def _products(self, case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
        made = []
        for a, b, k in case.products():
            sizes = ((case.batch, a, k), (case.batch, b, k), (case.batch, a, b))
            first, second, third = (torch.randn(size).to(getattr(torch, case.dtype)) for size in sizes)
            made.append((first, second, third))
        return made

    def _floor(self, case: Case) -> Callable[[], Any]:
        """A plain pass over exactly the bytes of a loss and its gradient: reads student and teacher, and
        writes as much as one of them.
        """
        triples = list(zip([x.detach() for x in self.students], self.teachers, self.out, strict=True))
        return lambda: [torch.add(s, t, out=out) for s, t, out in triples]

    def _mm(self, case: Case) -> Callable[[], Any]:
        a, b = self.square
        return lambda: torch.mm(a, b)

    def _bmm(self, case: Case) -> Callable[[], Any]:
        """The products of the case and nothing else, from contiguous memory."""

        def forward() -> None:
            for a, b, _ in self.products:
                torch.bmm(a, b.transpose(1, 2))
                torch.bmm(a, b.transpose(1, 2))

        def both() -> None:
            forward()
            for a, b, d in self.products:
                torch.bmm(d, b)
                torch.bmm(d.transpose(1, 2), a)

        return forward if case.direction == FORWARD else both

    def _relu(self, case: Case) -> Callable[[], Any]:
        """Of the student's features, and its backward pass: what any operation of PyTorch costs, to be taken
        off a call of ours.
        """
        if case.direction == FORWARD:
            students = [x.detach() for x in self.students]
            return lambda: [torch.relu(x) for x in students]
        ones = [torch.ones_like(x) for x in self.students]

        def both() -> None:
            for x in self.students:
                x.grad = None
            torch.autograd.backward([torch.relu(x) for x in self.students], ones)

        return both


def traffic(case: Case, name: str, seconds: float, medians: dict[str, float]) -> dict[str, float]:
    """The bytes that a row has to move, at what rate it does, and what share that is of the floor's rate."""
    streamed = 3 * case.values() * getattr(torch, case.dtype).itemsize
    moved = streamed if name == FLOOR else case.bytes_moved()
    facts = {"bytes": moved, "gb_per_s": moved / seconds / 1e9}
    if FLOOR in medians:
        facts["of_streaming_bandwidth"] = moved / seconds / (streamed / medians[FLOOR])
    return facts


def figures(case: Case, rows: dict[str, Row], name: str) -> dict[str, Any]:
    """What a row's median says: rates, fractions of the run's yardsticks, ratios to the formulas."""
    row = rows[name]
    seconds = middle(row.seconds)
    medians = {other: middle(r.seconds) for other, r in rows.items() if r.seconds}
    facts: dict[str, Any] = {"milliseconds": 1e3 * seconds, **row.facts}
    if name in YARDSTICKS and name != FLOOR:
        flops = 2 * 1024**3 if name == MM else case.flops()
        return facts if name == RELU else {**facts, "gflop_per_s": flops / seconds / 1e9}
    facts |= traffic(case, name, seconds, medians)
    if case.flops() and name != FLOOR:
        rate = case.flops() / seconds
        facts["gflop_per_s"] = rate / 1e9
        if MM in medians:
            facts["of_mm_rate"] = rate / (2 * 1024**3 / medians[MM])
        if BMM in medians:
            facts["of_bmm_rate"] = medians[BMM] / seconds
    for other in (STOCK, TUNED, COMPILED, BROADCAST, BROADCAST_COMPILED):
        if other in medians and other != name and name != FLOOR:
            facts[f"speedup over {other}"] = medians[other] / seconds
    return facts


class LossGroup:
    """A case as the session sees a group: rows by name, their checks, and what the figures say."""

    labels: tuple[str, ...] = ("all threads", "1 thread")

    def __init__(self, case: Case, full: bool):
        self.case, self.full, self.id = case, full, case.id
        self.shared = case.inputs

    def names(self, one_thread: bool) -> list[str]:
        return row_names(self.case, self.full, one_thread)

    def build(self, stock: Stock) -> Rows:
        """What the groups with the same ``shared`` have in common."""
        return Rows(self.case, self.full, stock)

    def row(self, rows: Rows, name: str) -> Row:
        return rows.row(self.case, name)

    def check(self, rows: Rows, row: Row) -> None:
        rows.check(self.case, row)

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        return figures(self.case, rows, name)

    def describe(self) -> dict[str, Any]:
        case = self.case
        facts: dict[str, Any] = {
            "operation": case.operation,
            "shape": case.shape,
            "dtype": case.dtype,
            "layout": case.layout,
        }
        facts |= {
            "direction": case.direction,
            "upstream": case.upstream,
            "bytes": case.bytes_moved(),
            "memory_unit": case.unit_of_memory(),
        }
        return {**facts, "flops": case.flops()} if case.flops() else facts
