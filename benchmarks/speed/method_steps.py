"""Whole training steps of the other methods: with the loss as published, and as ``train.py`` takes them.

A step: the teacher without gradients, the student, cross-entropy and the method's loss (with KD where the
method's authors add it), backward, SGD, and the banks of CRD. The published one has plain PyTorch modules in
NCHW and the loss of ``published.py``; ours is channels_last, with a folded teacher, not compiled. Reading
images is part of neither. The published form is given CRD's rows ready-made, and so need not draw them.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from fastkd.methods.simkd import to_smaller
from fastkd.models import create_model
from fastkd.models.folding import channels_last
from speed import published
from speed.cases import SEED
from speed.measure import Row, threads
from speed.methods import OURS, PUBLISHED
from speed.stock import Stock

CLASSES = 100
NORMALIZERS = 1.1, 0.9  # times the number of images: CRD's, as after its first batch
# Against float64: of the loss, and of the gradient of all that is trained, in l2 norm. CRD's published form
# is 1.5e-4 off in float32.
TOLERANCE = {PUBLISHED: {"loss": 1e-2, "gradient": 5e-2}, OURS: {"loss": 1e-4, "gradient": 2e-2}}
# (distiller, rows or None, labels, student, teacher) -> what Distiller.loss returns
Form = Callable[[Any, Tensor | None, Any, Any, Any], Any]


def connected(distiller: Any, student: Any, teacher: Any) -> Any:
    """The student's maps through the method's own layers, which are plain ones."""
    return type(distiller).connect(distiller, None, student, teacher)


def _crd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    function, sides = distiller.function, (student.features.pooled, teacher.features.pooled)
    found = [embed(x) for embed, x in zip(distiller.embeddings, sides)]
    s, t = (x / x.pow(2).sum(1, keepdim=True).sqrt() for x in found)
    assert rows is not None
    normalizers = [factor * len(function.student_bank) for factor in NORMALIZERS]
    loss = published.crd(s, t, function.student_bank, function.teacher_bank, rows, normalizers)
    record = s.detach(), t.detach(), function.normalizers.expand(len(s), 2)
    return function.weight * loss, record


def _rkd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    return published.rkd(student.features.pooled, teacher.features.pooled)


def _dkd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    return published.dkd(student.logits, teacher.logits, labels)


def _afd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    maps = (distiller.blocks(x.features, role) for role, x in enumerate((student, teacher)))
    return published.afd(distiller.attention, *maps)


def _reviewkd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    mine, theirs = student.features, teacher.features.preact
    maps, targets = ([*x.stages, x.pooled[:, :, None, None]] for x in (mine, theirs))
    found = published.review([*distiller.levels], maps, [x.shape[2:] for x in targets])
    return published.hcl(found, targets)


def _semckd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    s, t = student.features.stages, teacher.features.stages
    regressed = [
        [nn.Sequential.forward(layer, to_smaller(x, y.shape[2:])) for layer, y in zip(row, t)]
        for row, x in zip(distiller.regressors, s)
    ]
    return published.calibration(regressed, t, distiller.attention(s, t))


def _sakd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    return published.sakd(connected(distiller, student, teacher), teacher.features.stages)


def _ofd(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    margins = [*distiller.function.buffers()]
    maps = connected(distiller, student, teacher)
    return published.ofd(maps, teacher.features.preact.stages, margins)


def _norm(distiller: Any, rows: Tensor | None, labels: Tensor, student: Any, teacher: Any) -> Any:
    return published.norm(student.features.neck, teacher.features.stages[-1])


@dataclass(frozen=True)
class Work:
    """A method's step. ``case``: the one of its losses of the same size. ``options``: what makes the loss
    that of ``published.py``, whatever the pair of networks.
    """

    method: str
    form: Form
    case: str = "batch 64"
    options: tuple[tuple[str, float], ...] = ()


STEPS = (
    Work("crd", _crd, "N 50000, K 16384, batch 64"),
    Work("dkd", _dkd, "batch 64, 100 classes", (("beta", 8.0),)),
    Work("rkd", _rkd, "batch 64, width 64"),
    Work("afd", _afd),
    Work("reviewkd", _reviewkd, options=(("beta", 1.0),)),
    Work("semckd", _semckd),
    Work("sakd", _sakd),
    Work("ofd", _ofd),
    Work("norm", _norm),
)


@dataclass(frozen=True)
class Sizes:
    """Of the networks, the batch and CRD's bank."""

    student: str = "resnet20"
    teacher: str = "resnet56"
    batch: int = 64
    images: int = 50_000
    k: int = 16_384


SMALL = Sizes("resnet8", "resnet20", 4, 20, 7)


class Step:
    """One batch, and a distillation for each form. The learning rate is 0, so the weights stay.

    ``exact``: loss and gradient in float64, by the published form.
    """

    def __init__(self, work: Work, sizes: Sizes):
        self.work, generator = work, torch.Generator().manual_seed(SEED)
        self.images = torch.randn(sizes.batch, 3, 32, 32, generator=generator)
        self.labels = torch.randint(CLASSES, (sizes.batch,), generator=generator)
        self.index = torch.randperm(sizes.images, generator=generator)[: sizes.batch]
        torch.manual_seed(SEED)
        student, teacher = (create_model(name, CLASSES) for name in (sizes.student, sizes.teacher))
        settle(teacher, self.images)
        options: dict[str, Any] = {**dict(work.options), **({"k": sizes.k} if work.method == "crd" else {})}
        build = functools.partial(
            fastkd.Distillation,
            method=work.method,
            options={work.method: options},
            batch_size=sizes.batch,
            train_labels=torch.arange(sizes.images) % CLASSES,
        )
        mine = build(student, teacher)
        theirs = build(copy.deepcopy(student), copy.deepcopy(teacher), fold=False)
        if work.method == "crd":
            given = torch.tensor(NORMALIZERS) * sizes.images
            for each in (mine, theirs):
                each.methods["crd"].get_submodule("function").get_buffer("normalizers").copy_(given)
        exact = copy.deepcopy(theirs).double()
        self.distillations = {PUBLISHED: self.publish(theirs), OURS: channels_last(mine)}
        self.begun = {name: copy.deepcopy(each.state_dict()) for name, each in self.distillations.items()}
        with fastkd.use_backend("reference"):
            loss = self.publish(exact).train()(self.images.double(), self.labels, self.index).total
            loss.backward()
        self.exact = loss.item(), gradient(exact)

    def publish(self, distillation: Any) -> Any:
        """The method's loss in ``distillation`` by its published form, in place."""
        distiller: Any = distillation.methods[self.work.method]
        rows = distiller.draw(self.index) if self.work.method == "crd" else None

        def loss(batch: Any, student: Any, teacher: Any, connected: Any) -> Any:
            return self.work.form(distiller, rows, self.labels, student, teacher)

        distiller.connect, distiller.loss = lambda *_: None, loss
        return distillation

    def restore(self, name: str) -> None:
        """What steps have changed: the banks of CRD, running means."""
        self.distillations[name].load_state_dict(self.begun[name])

    def run(self, name: str) -> Callable[[], Tensor]:
        """The step of one form."""
        distillation = self.distillations[name].train()
        rest: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4}
        if name == OURS:
            rest["fused"] = True  # as fastkd.training has it
        optimizer = torch.optim.SGD(distillation.parameters(), 0.0, **rest)
        images = self.images
        if name == OURS:
            images = images.contiguous(memory_format=torch.channels_last)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            losses = distillation(images, self.labels, self.index)
            losses.total.backward()
            optimizer.step()
            distillation.update(self.index, losses.records)
            return losses.total

        return step


def settle(network: nn.Module, images: Tensor) -> None:
    """Gives the norms of an untrained network the moments of a batch, so that its maps are as large as a
    trained one's.
    """
    norms = [x for x in network.modules() if isinstance(x, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


def gradient(distillation: nn.Module) -> Tensor:
    """Of all that is trained, as one vector in float64."""
    return torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten()
            for p in distillation.parameters()
        ]
    )


class MethodStepGroup:
    """A method's step as the session sees a group. It has few rounds, since a step takes up to a second."""

    labels: tuple[str, ...] = ("all threads", "1 thread")
    rounds = (3, 3)

    def __init__(self, work: Work, full: bool):
        self.work, self.full = work, full
        self.sizes = Sizes() if full else SMALL
        self.id = f"method {work.method} step {self.sizes.teacher} {self.sizes.student}"
        self.shared = self.id

    def names(self, one_thread: bool) -> list[str]:
        return [PUBLISHED, OURS]

    def build(self, stock: Stock) -> Step:
        # two threads on what is so small wait for each other where a machine is busy
        with threads(torch.get_num_threads() if self.full else 1):
            return Step(self.work, self.sizes)

    def row(self, built: Step, name: str) -> Row:
        backend = "reference" if name == PUBLISHED else "auto"
        return Row(name, built.run(name), functools.partial(fastkd.use_backend, backend))

    def check(self, built: Step, row: Row) -> None:
        """Run the row once, from where it began: errors go into ``facts``, a wrong result into ``failed``."""
        built.restore(row.name)
        with row.context():
            begun = time.perf_counter()
            value = row.run().item()
            row.guess = time.perf_counter() - begun
        loss, exact = built.exact
        found = gradient(built.distillations[row.name])
        errors = {
            "loss": abs(value - loss) / abs(loss),
            "gradient": float((found - exact).norm() / exact.norm()),
        }
        row.facts["error"] = errors
        limits = TOLERANCE[row.name]
        if any(not errors[what] <= limits[what] for what in errors):
            row.failed = f"wrong: relative error {errors}, at most {limits} allowed"

    def figures(self, rows: dict[str, Row], name: str) -> dict[str, Any]:
        return {"milliseconds": 1e3 * median(rows[name].seconds), **rows[name].facts}

    def describe(self) -> dict[str, Any]:
        networks = f"{self.sizes.teacher} > {self.sizes.student}, batch {self.sizes.batch}"
        return {
            "method": f"{self.work.method} step",
            "case": networks,
            "of": [self.work.method, self.work.case],
        }


def groups(full: bool) -> list[MethodStepGroup]:
    return [MethodStepGroup(work, full) for work in STEPS]
