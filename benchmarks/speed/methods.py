"""The losses of the other methods against their published form, forward and backward, in float32.

Shapes are those of ResNet-56 teaching ResNet-20 on CIFAR at batch 64, unless a problem's name says otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.methods.afd import Attention, weighted
from fastkd.methods.reviewkd import ABF, review
from fastkd.methods.semckd import Embedding, Regressor, calibration, similarities
from fastkd.methods.simkd import to_smaller
from fastkd.ops.norm import norm_loss
from speed import published
from speed.cases import SEED
from speed.measure import Row, both_passes, peak_memory
from speed.stock import Stock

PUBLISHED, OURS = "published", "fastkd"
# of the loss, and of a gradient against its largest number; CRD's published form is 1.5e-4 off in float32
TOLERANCE = {PUBLISHED: 1e-2, OURS: 1e-4}
Loss = Callable[[], Tensor]
STAGES = ((16, 32), (32, 16), (64, 8))


class Draw:
    """Random tensors, the same for every dtype and device: drawn in float32, then converted."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu"):
        torch.manual_seed(SEED)
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(SEED)
        self.device = device

    def __call__(self, *shape: int, unit: bool = False, grad: bool = False) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        x = torch.nn.functional.normalize(x) if unit else x
        return x.to(self.device, self.dtype).requires_grad_(grad)

    def rows(self, count: int, size: int, drawn: int) -> Tensor:
        return torch.randint(size, (count, drawn), generator=self.generator).to(self.device)

    def stages(self, batch: int, grad: bool, repeats: int = 1) -> list[Tensor]:
        """The maps of each stage, ``repeats`` blocks a stage, after a ReLU."""
        found = [self(batch, c, s, s).relu() for c, s in STAGES for _ in range(repeats)]
        return [x.requires_grad_(grad) for x in found]


@dataclass
class Problem:
    """What is differentiated, and the two forms of a loss over it."""

    leaves: list[Tensor]
    published: Loss
    fastkd: Loss


def crd(draw: Draw, batch: int, size: int, k: int, width: int = 128) -> Problem:
    s, t = draw(batch, width, unit=True, grad=True), draw(batch, width, unit=True, grad=True)
    banks = draw(size, width, unit=True), draw(size, width, unit=True)
    rows, normalizers = draw.rows(batch, size, k + 1), (1.1 * size, 0.9 * size)
    given = torch.tensor(normalizers, dtype=draw.dtype, device=draw.device)
    return Problem(
        [s, t],
        lambda: published.crd(s, t, *banks, rows, normalizers),
        lambda: fastkd.crd_loss(s, t, *banks, rows, normalizers=given)[0],
    )


def dkd(draw: Draw, batch: int, classes: int) -> Problem:
    s, t = draw(batch, classes, grad=True), draw(batch, classes)
    labels = draw.rows(batch, classes, 1)[:, 0]
    return Problem([s], lambda: published.dkd(s, t, labels), lambda: fastkd.dkd_loss(s, t, labels))


def rkd(draw: Draw, batch: int, width: int) -> Problem:
    s, t = draw(batch, width, grad=True), draw(batch, width)
    return Problem([s], lambda: published.rkd(s, t), lambda: fastkd.rkd_loss(s, t))


def afd(draw: Draw, batch: int, blocks: tuple[int, int]) -> Problem:
    students, teachers = draw.stages(batch, True, blocks[0]), draw.stages(batch, False, blocks[1])
    mine, theirs = ([x.shape[1] for x in side] for side in (students, teachers))
    attention = Attention(mine, theirs, 128).to(draw.dtype)

    return Problem(
        students,
        lambda: published.afd(attention, students, teachers),
        lambda: 200 * weighted(attention, students, teachers),
    )


def _levels(draw: Draw, batch: int, grad: bool) -> list[Tensor]:
    """Three stages and the pooled vector as a map of one position."""
    return [*draw.stages(batch, grad), draw(batch, 64, 1, 1, grad=grad)]


def hcl(draw: Draw, batch: int) -> Problem:
    s, t = _levels(draw, batch, True), _levels(draw, batch, False)
    return Problem(s, lambda: published.hcl(s, t), lambda: fastkd.hcl_loss(s, t))


def reviewkd(draw: Draw, batch: int) -> Problem:
    s, t = _levels(draw, batch, True), _levels(draw, batch, False)
    widths = [x.shape[1] for x in s]
    levels = nn.ModuleList(ABF(c, 64, c, i < len(s) - 1) for i, c in enumerate(widths)).to(draw.dtype)

    sizes = [x.shape[2:] for x in t]
    return Problem(
        s,
        lambda: published.hcl(published.review([*levels], s, sizes), t),
        lambda: fastkd.hcl_loss(review(levels, s, sizes), t),
    )


def semckd(draw: Draw, batch: int) -> Problem:
    s, t = draw.stages(batch, True), tuple(draw.stages(batch, False))
    regressors = [[Regressor(a.shape[1], b.shape[1]).to(draw.dtype) for b in t] for a in s]
    queries, keys = ([Embedding(batch, batch // 4).to(draw.dtype) for _ in side] for side in (s, t))

    def inputs(regress: Callable[[Regressor, Tensor], Tensor]) -> tuple[list[list[Tensor]], Tensor]:
        connected = [
            [regress(layer, to_smaller(x, y.shape[2:])) for layer, y in zip(row, t)]
            for row, x in zip(regressors, s)
        ]
        mine, theirs = (
            torch.stack([layer(similarities(x)) for layer, x in zip(layers, side)], 1)
            for layers, side in ((queries, s), (keys, t))
        )
        return connected, (mine @ theirs.mT).softmax(2)

    def form(
        regress: Callable[[Regressor, Tensor], Tensor], loss: Callable[..., Tensor], weight: float
    ) -> Tensor:
        connected, shares = inputs(regress)
        return weight * loss(connected, t, shares)

    return Problem(
        s,
        lambda: form(nn.Sequential.forward, published.calibration, 1),  # layer by layer
        lambda: form(Regressor.__call__, calibration, 400),
    )


def sakd(draw: Draw, batch: int) -> Problem:
    s, t = draw.stages(batch, True), draw.stages(batch, False)
    return Problem(s, lambda: published.sakd(s, t), lambda: fastkd.sakd_loss(s, t))


def ofd(draw: Draw, batch: int) -> Problem:
    s, t = ([draw(batch, c, side, side, grad=grad) for c, side in STAGES] for grad in (True, False))
    margins = [-draw(c).abs() for c, _ in STAGES]
    return Problem(s, lambda: published.ofd(s, t, margins), lambda: fastkd.ofd_loss(s, t, margins))


def norm(draw: Draw, batch: int) -> Problem:
    u, target = draw(batch, 512, 8, 8, grad=True), draw(batch, 64, 8, 8).relu()
    return Problem([u], lambda: published.norm(u, target), lambda: norm_loss(u, target, 8))


Make = Callable[..., Problem]
# (how it is made, its sizes, those of an ordinary pytest run)
PROBLEMS: tuple[tuple[Make, dict[str, Any], dict[str, Any]], ...] = (
    (crd, {"batch": 64, "size": 50_000, "k": 16_384}, {"batch": 3, "size": 20, "k": 7, "width": 5}),
    (dkd, {"batch": 64, "classes": 100}, {"batch": 4, "classes": 5}),
    (rkd, {"batch": 64, "width": 64}, {"batch": 4, "width": 5}),
    (rkd, {"batch": 256, "width": 512}, {"batch": 5, "width": 3}),
    (afd, {"batch": 64, "blocks": (3, 9)}, {"batch": 3, "blocks": (1, 2)}),
    *((make, {"batch": 64}, {"batch": 4}) for make in (hcl, reviewkd, semckd, sakd, ofd, norm)),
)
SPELLED = {"size": "N {}", "k": "K {}", "batch": "batch {}", "width": "width {}", "classes": "{} classes"}


def spelled(sizes: dict[str, Any]) -> str:
    """What is particular of a case, in the same words whatever it is measured on."""
    return ", ".join(words.format(sizes[name]) for name, words in SPELLED.items() if name in sizes)


class MethodGroup:
    """A loss of a method as the session sees a group: the published form and ours."""

    labels: tuple[str, ...] = ("all threads", "1 thread")

    def __init__(self, make: Make, note: str, sizes: dict[str, Any], full: bool):
        self.method, self.note, self.full = make.__name__, note, full
        self.make = functools.partial(make, **sizes)
        self.id = f"method {self.method} {note}"
        self.shared = self.id

    def names(self, one_thread: bool) -> list[str]:
        return [PUBLISHED, OURS]

    def build(self, stock: Stock) -> tuple[Problem, Tensor, list[Tensor]]:
        """The tensors, and the exact loss and gradients: the published form in float64."""
        exact = self.make(Draw(torch.float64))
        loss = exact.published()
        return self.make(Draw(torch.float32)), loss.detach(), list(torch.autograd.grad(loss, exact.leaves))

    def row(self, built: tuple[Problem, Tensor, list[Tensor]], name: str) -> Row:
        problem = built[0]
        loss = problem.published if name == PUBLISHED else problem.fastkd
        return Row(name, both_passes(loss, problem.leaves), tolerance=TOLERANCE[name])

    def check(self, built: tuple[Problem, Tensor, list[Tensor]], row: Row) -> None:
        """Run the row: errors and peak memory, gradients included, go into ``facts``, a wrong result into
        ``failed``.
        """
        row.run()
        values: list[Tensor] = []
        peak = peak_memory(lambda: values.append(row.run())) if self.full else None
        if peak is not None:
            row.facts["extra_memory"] = peak
        self.compare(built, row, values[0] if values else None)

    def compare(
        self, built: tuple[Problem, Tensor, list[Tensor]], row: Row, value: Tensor | None = None
    ) -> None:
        """Errors of the row's loss, ``value`` where it has run already, and of the gradients that it left."""
        problem, exact, gradients = built
        value = row.run() if value is None else value
        found = [x.grad if x.grad is not None else torch.zeros_like(x) for x in problem.leaves]
        errors = {
            "loss": float((value.detach() - exact).abs() / exact.abs()),
            "gradient": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, gradients)),
        }
        row.facts["error"] = errors
        assert row.tolerance is not None
        if any(not error <= row.tolerance for error in errors.values()):
            row.failed = f"wrong: relative error {errors}, at most {row.tolerance} allowed"

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        return {"milliseconds": 1e3 * median(rows[name].seconds), **rows[name].facts}

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "case": self.note}


def groups(full: bool) -> list[MethodGroup]:
    return [MethodGroup(make, spelled(big), big if full else small, full) for make, big, small in PROBLEMS]
