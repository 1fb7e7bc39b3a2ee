"""Batches of images that do not fit in memory: worker processes read and cut them ahead of the steps."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastkd.data import files
from fastkd.data.files import Paths
from fastkd.data.loader import AnyBatches
from fastkd.errors import UserError, one_line
from fastkd.io.console import say
from fastkd.seeds import generator

Key = tuple[int, int]
"""(epoch, or 0 for the images as they are; place of the image in its set)."""


class Read(NamedTuple):
    """A batch as a worker returns it. ``places`` (N,) int64 are the indices of the images; ``bad`` maps the
    index of each file that cannot be read to the reason.
    """

    pixels: list[Tensor]  # for each size uint8 (N, S, S, 3)
    places: Tensor
    bad: dict[int, str]


class Drawn:
    """A batch that was read. ``index`` (N,) int64: the indices of its images."""

    def __init__(self, pixels: list[Tensor], index: Tensor):
        self.pixels, self.index = pixels, index

    def __len__(self) -> int:
        return len(self.index)


class _Images(Dataset):
    """Whole batches by their keys. What is random in an image comes from (seed, stream, epoch, index)."""

    def __init__(self, paths: Paths, sizes: Sequence[int], seed: int, stream: str, flip: bool):
        self.paths, self.sizes, self.seed, self.stream, self.flip = paths, sizes, seed, stream, flip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, keys: Sequence[Key]) -> Read:
        found: dict[int, list[Tensor]] = {}
        bad: dict[int, str] = {}
        for place, (epoch, index) in enumerate(keys):
            try:
                found[place] = self._image(epoch, index)
            except ValueError as error:
                bad[index] = str(error)
        rows = list(found)
        if keys[0][0] and rows:  # in training the next image of the batch that can be read takes its place
            rows = [next((row for row in rows if row >= place), rows[0]) for place in range(len(keys))]
        places = torch.tensor([keys[row][1] for row in rows], dtype=torch.int64)
        return Read([torch.stack(parts) for parts in zip(*(found[row] for row in rows))], places, bad)

    def _image(self, epoch: int, index: int) -> list[Tensor]:
        image = files.read(self.paths[index])
        if not epoch:
            return [files.for_testing(image, size) for size in self.sizes]
        random = generator(self.seed, self.stream, epoch, index)
        return files.for_training(image, self.sizes, random, self.flip)


class _Keys:
    """The batches of keys that a loader's workers get next."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class StreamedBatches(AnyBatches):
    """Normalized batches of the files ``paths``, read by ``workers`` processes (0: by this one).

    The interface of :class:`fastkd.data.loader.Batches`. ``sides``: the side of the student's images and, if
    it is another, that of the teacher's, which show the same crop. ``test()`` gives the last of them.

    A file that is no whole image is named and counted. With ``on_bad`` "stop" it raises UserError, which ends
    with ``advice``. With "skip" a test leaves it out, and in training the next image of the same batch takes
    its place, so that the number of images in a step stays the same. ``bad`` maps the path of each such file
    to the reason, and ``skipped`` counts those of the current epoch. ``waited``: seconds for which the steps
    of that epoch, except the first, waited for images.
    """

    def __init__(
        self,
        paths: Paths,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int,
        sides: Sequence[int] = (224,),
        order: Tensor | None = None,
        workers: int = 0,
        on_bad: str = "stop",
        advice: str = "--on-bad-image skip goes on without it",
        seed: int = 0,
        stream: str = "data",
        flip: bool = True,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.paths, self.sides, self.workers = paths, tuple(sides), workers
        self.on_bad, self.advice = on_bad, advice
        self.order = torch.arange(len(paths)) if order is None else order
        self.count, self.batch_size, self.drop_last, self.share = len(paths), batch_size, drop_last, share
        self.joined = batch_size * share[1]
        self.seed, self.stream, self.flip, self.dtype = seed, stream, flip, dtype
        self.device, self.labels = torch.device(device), labels
        self.scale, self.shift = 1 / (255 * torch.tensor(std)), -torch.tensor(mean) / torch.tensor(std)
        self.bad: dict[str, str] = {}
        self.skipped, self.waited = 0, 0.0
        self._loader: DataLoader | None = None

    def draw(self, epoch: int) -> Iterator[Drawn]:
        """The batches of ``epoch`` as :meth:`inputs` wants them: from (seed, stream, epoch) alone."""
        random, (rank, world) = generator(self.seed, self.stream, epoch), self.share
        order = torch.randperm(self.count, generator=random)
        parts = [
            order[i * self.joined : (i + 1) * self.joined].tensor_split(world)[rank] for i in range(len(self))
        ]
        if self._loader is None:  # its workers last for all epochs
            self._loader = self._loading(self.sides, lasting=True)
        yield from self._read(self._loader, [[(epoch, i) for i in part.tolist()] for part in parts])

    def inputs(self, drawn: Drawn) -> tuple[Tensor, ...]:
        """(images, labels, index) of a batch, and the teacher's images where they have another size."""
        index = drawn.index.to(self.device, non_blocking=True)
        images = [self._normalized(pixels) for pixels in drawn.pixels]
        labels = self.labels[drawn.index].to(self.device, non_blocking=True)
        return (images[0], labels, index, *images[1:])

    def test(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, their centres: (images, labels)."""
        whole = self.count - self.count % self.batch_size * self.drop_last
        keys = [[(0, i) for i in part.tolist()] for part in self.order[:whole].split(self.batch_size)]
        keys = keys[share[0] :: share[1]]
        for drawn in self._read(self._loading(self.sides[-1:], lasting=False), keys):
            if len(drawn):
                images, labels, *_ = self.inputs(drawn)
                yield images, labels

    def _loading(self, sides: Sequence[int], lasting: bool) -> DataLoader:
        images = _Images(self.paths, sides, self.seed, self.stream, self.flip)
        return DataLoader(
            images,
            batch_sampler=_Keys(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_unsignalled,
            persistent_workers=lasting and self.workers > 0,
            generator=generator(self.seed, "workers"),  # or it would draw from PyTorch's own
        )

    def _read(self, loader: DataLoader, keys: list[list[Key]]) -> Iterator[Drawn]:
        sampler: Any = loader.batch_sampler
        sampler.batches = keys
        self.skipped, self.waited, begun = 0, 0.0, time.perf_counter()
        try:
            for i, (pixels, places, bad) in enumerate(iter(loader)):
                self.waited += (time.perf_counter() - begun) * (i > 0)
                self._note(bad, whole=not len(places))
                yield Drawn(pixels, places)
                begun = time.perf_counter()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            why = one_line(error)[:150]
            raise UserError(f"a process that reads images ended ({why}): fewer --workers?") from None

    def _note(self, bad: dict[int, str], whole: bool) -> None:
        self.skipped += len(bad)
        for index, why in bad.items():
            path = self.paths[index]
            if self.on_bad == "stop":
                raise UserError("; ".join(filter(None, [why, self.advice])))
            if whole and self.batch_size > 1:
                raise UserError(f"{why}, nor can any other image of its batch be read")
            if path not in self.bad:
                self.bad[path] = why
                say(f"image skipped: {why}")

    def _normalized(self, raw: Tensor) -> Tensor:
        side = raw.shape[1]
        # whole maps and not three numbers, so that the arithmetic runs over long rows
        scale, shift = (
            x.to(self.device).expand(side, side, 3).contiguous() for x in (self.scale, self.shift)
        )
        images = raw.to(self.device, non_blocking=True).to(torch.float32).mul_(scale).add_(shift)
        return images.to(self.dtype).permute(0, 3, 1, 2)


def _as_it_is(batch: Any) -> Any:
    return batch


def _silent(*error: Any) -> None:
    pass


def _unsignalled(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one ends its workers.

    What a worker raises reaches the main process. The thread that hands tensors over would print, beside
    that, where a run was stopped while it took one.
    """
    sys.excepthook = _silent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
