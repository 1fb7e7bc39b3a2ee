"""Shapes, and one :class:`Case` for each group of rows that are measured side by side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A network's stages, (channels, height = width) each, at a batch size; for FSP the stem comes first."""

    batch: int
    stages: tuple[tuple[int, int], ...]
    stem: tuple[int, int] | None = None


SHAPES = {
    "resnet20-64": Shape(64, ((16, 32), (32, 16), (64, 8)), (16, 32)),
    "resnet20-128": Shape(128, ((16, 32), (32, 16), (64, 8)), (16, 32)),
    "wrn40_2-128": Shape(128, ((32, 32), (64, 16), (128, 8)), (16, 32)),
    "resnet32x4-64": Shape(64, ((64, 32), (128, 16), (256, 8)), (32, 32)),
    "resnet32x4-128": Shape(128, ((64, 32), (128, 16), (256, 8)), (32, 32)),  # as on a GPU
    "resnet50-64": Shape(64, ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    "resnet50-8": Shape(8, ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    "tiny-2": Shape(2, ((8, 4),) * 3),  # the cost of a call, with no arithmetic to speak of
    "small": Shape(3, ((4, 6), (6, 3), (5, 3)), (4, 6)),  # an ordinary pytest run, which measures nothing
}
CIFAR = ("resnet20-64", "resnet20-128", "wrn40_2-128", "resnet32x4-64")
NETWORKS = (*CIFAR, "resnet50-8")

FORWARD, BOTH = "forward", "forward+backward"
NCHW, NHWC = "nchw", "channels_last"
FORMATS = {NCHW: torch.contiguous_format, NHWC: torch.channels_last}
SEED = 20261121


@dataclass(frozen=True)
class Case:
    """One group: an operation ("attention" or "fsp") over a network's stages, student and teacher alike.

    ``upstream`` is what multiplies the loss outside of it; the loss's own weight is 1.
    """

    operation: str
    shape: str
    dtype: str = "float32"
    layout: str = NCHW
    direction: str = BOTH
    upstream: int = 1

    @property
    def id(self) -> str:
        upstream = "" if self.upstream == 1 else f" upstream {self.upstream}"
        return f"{self.operation} {self.shape} {self.dtype} {self.layout} {self.direction}{upstream}"

    @property
    def inputs(self) -> tuple[str, str, str, str]:
        """Cases that agree in this share their tensors and their compiled functions."""
        return self.operation, self.shape, self.dtype, self.layout

    @property
    def batch(self) -> int:
        return SHAPES[self.shape].batch

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(channels, height) of every feature, the stem's first where the operation takes it."""
        shape = SHAPES[self.shape]
        return [shape.stem, *shape.stages] if self.operation == "fsp" and shape.stem else list(shape.stages)

    @property
    def plain(self) -> bool:
        """float32 and NCHW, forward and backward: what the goals are about, and what gets every row."""
        return (self.dtype, self.layout, self.direction) == ("float32", NCHW, BOTH)

    def values(self) -> int:
        """Numbers in the features of one network."""
        return self.batch * sum(c * s * s for c, s in self.stages)

    def bytes_moved(self) -> int:
        """The floor: each input read once and each gradient written once."""
        passes = 2 if self.direction == FORWARD else 3
        return passes * self.values() * getattr(torch, self.dtype).itemsize

    def products(self) -> list[tuple[int, int, int]]:
        """(Ca, Cb, positions) of each of FSP's pairs."""
        return (
            [(a, b, min(i, j) ** 2) for (a, i), (b, j) in itertools.pairwise(self.stages)]
            if self.operation == "fsp"
            else []
        )

    def flops(self) -> int:
        """Of FSP's matrix products: for each pair two forward (student's and teacher's), two backward."""
        return (2 if self.direction == FORWARD else 4) * sum(
            2 * self.batch * a * b * k for a, b, k in self.products()
        )

    def unit_of_memory(self) -> int:
        """Bytes of a float32 map for each stage, or matrix for each pair: the unit of the memory's goals."""
        if self.operation == "fsp":
            return 4 * self.batch * sum(a * b for a, b, _ in self.products())
        return 4 * self.batch * sum(s * s for _, s in self.stages)


def features(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher features, the same in every process; the student's need gradients. On the CPU."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(channels: int, size: int) -> Tensor:
        x = torch.randn(case.batch, channels, size, size, generator=generator)
        return x.to(getattr(torch, case.dtype)).to(memory_format=FORMATS[case.layout])

    students, teachers = ([draw(*stage) for stage in case.stages] for _ in range(2))
    return [x.requires_grad_() for x in students], teachers


def grid(operation: str, full: bool, tiny: bool = False, upstream: int | None = None) -> list[Case]:
    """The cases of an operation, equal inputs beside each other; one small shape if not ``full``."""
    cases = []
    for shape in NETWORKS if full else ("small",):
        for dtype, layout in itertools.product(("float32", "bfloat16"), (NCHW, NHWC)):
            cases.append(Case(operation, shape, dtype, layout))
            if upstream and cases[-1].plain and shape != "resnet50-8":
                cases.append(Case(operation, shape, upstream=upstream))
            if (dtype, layout) == ("float32", NCHW):
                cases.append(Case(operation, shape, direction=FORWARD))
    if tiny and full:
        cases += [Case(operation, "tiny-2"), Case(operation, "tiny-2", direction=FORWARD)]
    return cases
