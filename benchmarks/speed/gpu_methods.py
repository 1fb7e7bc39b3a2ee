"""The losses of embeddings on a GPU: groups that benchmarks/test_methods.py adds where there is one, and what
smoke asks of them. Without a GPU an ordinary run calls the same code on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import backends
from speed.gpu import CAPTURED, GRAPH, WALL
from speed.gpu_clock import Captured, timed
from speed.measure import Row, both_passes
from speed.methods import PUBLISHED, TOLERANCE, Draw, MethodGroup, Problem, crd, rkd, spelled
from speed.stock import Stock

# (how it is made, its sizes)
PROBLEMS: tuple[tuple[Callable[..., Problem], dict[str, int]], ...] = (
    (crd, {"batch": 64, "size": 50_000, "k": 16_384}),
    (crd, {"batch": 256, "size": 50_000, "k": 16_384}),
    (crd, {"batch": 16, "size": 1_281_167, "k": 16_384}),
    (rkd, {"batch": 64, "width": 64}),
    (rkd, {"batch": 256, "width": 512}),
)
SMALL: dict[Callable[..., Problem], dict[str, int]] = {
    crd: {"batch": 3, "size": 20, "k": 7, "width": 5},
    rkd: {"batch": 5, "width": 3},
}
OURS = "fastkd, "
Counted = tuple[Callable[[], Tensor], list[Tensor]]  # a loss, and what it is differentiated by


class GPUMethodGroup(MethodGroup):
    """A loss of a method on a device, by one clock: the published form, and fastkd by plain PyTorch and by
    its kernels.
    """

    labels: tuple[str, ...] = ("device",)

    def __init__(self, make: Callable[..., Problem], sizes: dict[str, int], clock: str, full: bool):
        note = spelled(sizes) if full else "small"
        super().__init__(make, note, sizes, full)
        self.device, self.clock = "cuda" if torch.cuda.is_available() else "cpu", clock
        self.shared = f"{self.device} method {self.method} {note}"
        self.id = f"{self.shared} {clock}"

    def names(self, one_thread: bool) -> list[str]:
        served, reason = backends.availability()["triton"]
        kernels = ["triton"] if served and not (self.full and "interpreted" in reason) else []
        return [PUBLISHED, *(OURS + name for name in ("reference", *kernels))]

    def build(self, stock: Stock) -> tuple[Problem, Tensor, list[Tensor]]:
        exact = self.make(Draw(torch.float64, self.device))
        loss = exact.published()
        gradients = torch.autograd.grad(loss, exact.leaves)
        return self.make(Draw(torch.float32, self.device)), loss.detach(), list(gradients)

    def row(self, built: tuple[Problem, Tensor, list[Tensor]], name: str) -> Row:
        problem, backend = built[0], name.removeprefix(OURS)
        loss = problem.published if name == PUBLISHED else problem.fastkd
        context = functools.partial(fastkd.use_backend, "auto" if name == PUBLISHED else backend)
        both = both_passes(loss, problem.leaves)

        def turn(calls: int, warm: bool, clock: str) -> float:
            with context():
                return timed(both, calls, warm, self.device)

        tolerance = TOLERANCE[PUBLISHED if name == PUBLISHED else "fastkd"]
        if self.clock == GRAPH:
            return Row(name, both, context, tolerance, Captured([both] * CAPTURED, context).turn)
        return Row(name, both, context, tolerance, turn)

    def check(self, built: tuple[Problem, Tensor, list[Tensor]], row: Row) -> None:
        with row.context():
            self.compare(built, row)
        if self.device == "cuda":
            for x in built[0].leaves:
                x.grad = None  # as in MethodGroup.check, the gradients count as extra memory
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with row.context():
                row.run()
            row.facts["extra_memory"] = torch.cuda.max_memory_allocated() - before

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        seconds = median(rows[name].seconds)
        facts = {"milliseconds": 1e3 * seconds, **rows[name].facts}
        for other in (PUBLISHED, f"{OURS}reference"):
            if other != name and other in rows and rows[other].seconds:
                facts[f"speedup over {other}"] = median(rows[other].seconds) / seconds
        return facts

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "device": self.device, "clock": self.clock}


def groups(full: bool) -> list[GPUMethodGroup]:
    there = torch.cuda.is_available()
    if not full:
        clocks = (WALL, GRAPH) if there else (WALL,)
        return [
            GPUMethodGroup(make, sizes, clock, False) for make, sizes in SMALL.items() for clock in clocks
        ]
    problems = PROBLEMS if there else ()
    return [GPUMethodGroup(make, sizes, clock, True) for make, sizes in problems for clock in (WALL, GRAPH)]


def _crd(module: Any, s: list[Tensor], t: list[Tensor]) -> Tensor:
    """Of embeddings that are parts of two features, against banks that are drawn."""
    dtype = torch.float64 if s[0].dtype == torch.float64 else torch.float32
    x, y = (torch.nn.functional.normalize(side[0].flatten(1)[:, :100].to(dtype)) for side in (s, t))
    made = torch.Generator().manual_seed(0)
    banks = [torch.randn(300, 100, generator=made).to(x) / 10 for _ in range(2)]
    rows = torch.randint(300, (len(x), 2000), generator=made).to(x.device)
    loss: Tensor = module.crd_loss(x, y, *banks, rows)[0]
    return loss


def operations(module: Any) -> dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]]:
    """What gpu_parts.py's smoke asks of a backend with kernels for embeddings, as scalars of features."""
    return {"crd_loss": functools.partial(_crd, module), "rkd_loss": lambda s, t: module.rkd_loss(s[0], t[1])}


def counted(device: str, small: bool) -> dict[str, Callable[[], Counted]]:
    """Losses whose kernels gpu_parts.py counts, by name, each made when it is asked for."""

    def made(make: Callable[..., Problem], sizes: dict[str, int]) -> Counted:
        problem = make(Draw(torch.float32, device), **sizes)
        return problem.fastkd, problem.leaves

    wanted: dict[Callable[..., Problem], dict[str, int]]
    wanted = SMALL if small else {crd: PROBLEMS[0][1], rkd: PROBLEMS[-1][1]}
    return {make.__name__: functools.partial(made, make, sizes) for make, sizes in wanted.items()}
