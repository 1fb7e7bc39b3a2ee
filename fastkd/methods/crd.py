"""Contrastive representation distillation (Tian et al., 2020) on the pooled vectors, with a bank of
embeddings for each network, or a queue of the latest ones, or neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import checks, seeds
from fastkd.losses import CRD as CRDLoss
from fastkd.methods.base import Batch, BuildContext, Distiller, Output, Preset, option
from fastkd.methods.recent import Recent

MOST = 16384
"""The negatives of an image in all published code."""
NEGATIVES = ("bank", "queue", "batch")


class CRD(Distiller):
    """``fastkd.CRD`` of two learned embeddings of ``pooled``, each scored against the other's bank, which has
    a row for each image.

    The banks begin as random numbers. After a step the rows of its images move towards their embeddings. The
    negatives of an image are ``k`` images of other classes, drawn again in each epoch; they depend on the
    seed, the epoch and the image alone. They differ from each other, unless ``k`` is more than the images of
    other classes.

    A bank grows with the training set. With ``negatives=queue`` the latest embeddings of so many images are
    kept instead, with ``negatives=batch`` none: see :class:`fastkd.methods.recent.Recent`. Neither needs
    ``train_labels`` or ``index``.

    ``beta`` left open is KD-Zoo's: 0.2 where there are ten classes, else 0.8. Of several
    processes each divides the first batch's scores by the mean of its own images' scores; from then on all
    have the mean of all images, and the same banks.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float | None = option(0.8, "factor of the loss; none: 0.2 for ten classes, 0.8 for others")
        k: int | None = option(
            None, f"negatives of an image; none: a third of the training images, at most {MOST}"
        )
        temperature: float = option(0.07, "divides the scores")
        momentum: float = option(0.5, "share of the old embedding in a new row of a bank")
        width: int = option(128, "of the embeddings")
        positive: str = option("exact", "the image itself, or one drawn of its class", ("exact", "relax"))
        negatives: str = option(
            "bank", "of a bank of all images, of a queue of the latest, or of the batch", NEGATIVES
        )
        queue: int = option(MOST, "length of the queue")

        def __post_init__(self) -> None:
            for name, value in (("k", self.k), ("width", self.width), ("queue", self.queue)):
                if value is not None and value < 1:
                    raise ValueError(f"{name} is {value}, wanted at least 1")
            if not self.temperature > 0:
                raise ValueError(f"temperature is {self.temperature}, wanted a number above 0")
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum is {self.momentum}, wanted at least 0 and less than 1")
            if self.negatives != "queue" and self.queue != MOST:
                raise ValueError(f"queue is {self.queue}, but negatives is {self.negatives}: leave it out")
            if self.negatives != "bank" and (self.k is not None or self.positive != "exact"):
                what = f"k is {self.k}" if self.k is not None else f"positive is {self.positive}"
                raise ValueError(
                    f"{what}, but nothing is drawn with negatives={self.negatives}: leave it out"
                )

    title, colour = "CRD", "#882255"
    canonical = "repdistiller"
    presets = {
        "repdistiller": Preset({"temperature": 0.07, "beta": 0.8}),
        "mdistiller": Preset({"temperature": 0.07, "beta": 0.8}),
        "kdzoo": Preset({"temperature": 0.1, "beta": None}),
    }

    labels: Tensor
    counts: Tensor
    firsts: Tensor
    by_class: Tensor
    order: Tensor
    order_labels: Tensor
    starts: Tensor
    chances: Tensor
    function: CRDLoss | None

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        beta, width = options.beta, options.width
        if beta is None:
            beta = 0.2 if context.num_classes == 10 else 0.8
        self.settled = {"beta": beta} if options.beta is None else {}
        self.embeddings = nn.ModuleList(
            nn.Linear(int(shapes.pooled[0]), width)
            for shapes in (context.student_shapes, context.teacher_shapes)
        )
        self.momentum, self.function = options.momentum, None
        if options.negatives != "bank":
            length = options.queue if options.negatives == "queue" else 0
            self.recent = Recent(length, width, options.temperature, beta)
            return
        if context.train_labels is None:
            raise ValueError(
                "train_labels is None, wanted the labels of the training set: crd keeps two embeddings of"
                " each image, but with negatives=queue or negatives=batch"
            )
        labels = checks.train_labels(context.train_labels).cpu()
        self.seed = torch.initial_seed()
        self.positive, self.k = options.positive, options.k
        if options.k is None:
            self.k = max(1, min(MOST, len(labels) // 3))
            self.settled = {**self.settled, "k": self.k}
        bound = math.sqrt(3 / width)
        banks = [torch.empty(len(labels), width).uniform_(-bound, bound) for _ in range(2)]
        self.function = CRDLoss(*banks, temperature=options.temperature, weight=beta)
        self._classes(labels)
        self.set_epoch(0, 1)

    def _classes(self, labels: Tensor) -> None:
        """Buffers of what the labels say: the images in the order of their classes, and for each image where
        its class lies there.
        """
        names, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(
                f"train_labels has {len(names)} class, wanted at least two: the negatives of an image are of"
                " other classes"
            )
        size, most = len(labels), int(counts.max())
        self.repeats = self.k > size - most
        # as many images as hold k of other classes, wherever it begins
        self.window = min(size, self.k + most)
        buffers = {
            "labels": inverse,
            "counts": counts[inverse],
            "firsts": (counts.cumsum(0) - counts)[inverse],
            "by_class": inverse.argsort(stable=True),
            "order": torch.zeros(size + self.window, dtype=torch.int64),
            "order_labels": torch.zeros(size + self.window, dtype=torch.int32),
            "starts": torch.zeros(size, dtype=torch.int64),
            "chances": torch.zeros(size + self.repeats * self.k, dtype=torch.float64),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        if self.function is None:  # nothing is drawn
            return
        generator = seeds.generator(self.seed, "crd", epoch)
        size = len(self.starts)
        order = torch.randperm(size, generator=generator)
        self.order.copy_(torch.cat([order, order[: self.window]]))  # so that a window may begin anywhere
        self.order_labels.copy_(self.labels[self.order])
        self.starts.copy_(torch.randint(size, (size,), generator=generator))
        self.chances.copy_(torch.rand(self.chances.shape, generator=generator, dtype=torch.float64))

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> tuple[Tensor, Any]:
        sides = zip(self.embeddings, (student, teacher), strict=True)
        found = [embed(side.features.pooled.to(embed.weight.dtype)) for embed, side in sides]  # type: ignore[arg-type]
        units = [x / torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in found]
        if self.function is None:
            loss, normalizers = self.recent(*units)
        else:
            loss, normalizers = self.function(*units, self.draw(self._places(batch.index, len(units[0]))))
        return loss, (units[0].detach(), units[1].detach(), normalizers.expand(len(units[0]), 2))

    def _places(self, index: Tensor | None, images: int) -> Tensor:
        if index is None:
            raise ValueError(
                "index is None, wanted where each image stands in train_labels: crd keeps two embeddings of"
                " each image"
            )
        index = checks.image_numbers("index", index, images)
        if not torch.compiler.is_compiling():
            checks.crd_rows(index, len(self.labels), "index")
        return index

    def update(self, index: Tensor, record: Any) -> None:
        student, teacher, normalizers = record
        if self.function is None:
            self.recent.update(student, teacher, normalizers.mean(0))
        else:
            index = self._places(index, len(student))
            self.function.update(index, student, teacher, normalizers.mean(0), self.momentum)

    def draw(self, index: Tensor) -> Tensor:
        """(N, k + 1): for each image its positive, then its negatives."""
        positives = index
        if self.positive == "relax":
            place = self.firsts[index] + (self.chances[index] * self.counts[index]).long()
            positives = self.by_class[place]
        if self.repeats:
            return torch.cat([positives[:, None], self._with_repeats(index)], 1)
        rows = self._without(index)
        rows[:, 0] = positives
        return rows

    def _without(self, index: Tensor) -> Tensor:
        """From column 1 on the first k images of other classes, from the image's own beginning in the epoch's
        random order on. Column 0 holds anything.
        """
        begin = self.starts[index]
        # labels in 32 bits, in the order in which they are read: looking each one up took half of the time
        images, labels = (x.unfold(0, self.window, 1)[begin] for x in (self.order, self.order_labels))
        other = labels != self.labels[index].to(labels.dtype)[:, None]
        columns = other.cumsum(1)
        # all that is not wanted goes to column 0
        columns = torch.where(other & (columns <= self.k), columns, 0)
        return images.new_empty(len(index), self.k + 1).scatter_(1, columns, images)

    def _with_repeats(self, index: Tensor) -> Tensor:
        chances = self.chances.unfold(0, self.k, 1)[self.starts[index]]
        counts = self.counts[index][:, None]
        others = (chances * (len(self.labels) - counts)).long()
        return self.by_class[(self.firsts[index][:, None] + counts + others) % len(self.labels)]
