"""Batches from a set in memory: crop, flip and normalization are one gather a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastkd.seeds import generator

SIDE, PAD = 32, 4
PAD_MODES = ("reflect", "zero")


class AnyBatches(ABC):
    """The interface of batches for a training loop, wherever the images are. ``joined``: the number of images
    of all processes in a step.
    """

    count: int
    batch_size: int
    joined: int
    drop_last: bool
    share: tuple[int, int]
    seed: int
    stream: str
    dtype: torch.dtype
    device: torch.device

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.joined)
        # a batch norm needs two images in each process
        return whole + (not self.drop_last and rest >= 2 * self.share[1])

    def sizes(self) -> list[int]:
        """Images of all processes together in each step of an epoch."""
        return [min(self.joined, self.count - i * self.joined) for i in range(len(self))]

    @abstractmethod
    def draw(self, epoch: int) -> Iterator[Any]:
        """The training batches of ``epoch``, for :meth:`inputs`: from (seed, stream, epoch) alone."""

    @abstractmethod
    def inputs(self, drawn: Any) -> tuple[Tensor, ...]:
        """(images, labels, index, perhaps the teacher's images), as ``fastkd.Distillation`` takes them."""

    @abstractmethod
    def test(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, none changed at random: (images, labels). Of several processes,
        ``share`` = (i, n), process i of n gets the batches i, i + n, i + 2 n and so on.
        """


class Batches(AnyBatches):
    """Normalized batches, channels_last and of the step's dtype, from uint8 images (N, 3, 32, 32) that stay
    on the device.

    ``train(epoch)`` shuffles, pads by 4 (``reflect``, or black for ``zero``), crops 32x32 at a place of each
    image's own and flips every second image on average; ``test()`` goes through the images in order and
    changes nothing. Of several processes (``share``: which, of how many) each takes its part of every batch,
    which holds ``batch_size`` images for each of them.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        batch_size: int,
        seed: int = 0,
        stream: str = "data",
        flip: bool = True,
        pad_mode: str = "reflect",
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode is {pad_mode!r}, wanted one of {', '.join(PAD_MODES)}")
        self.count, self.batch_size, self.drop_last, self.share = len(images), batch_size, drop_last, share
        self.joined = batch_size * share[1]  # images of all processes in a step
        self.seed, self.stream, self.flip, self.pad_mode, self.dtype = seed, stream, flip, pad_mode, dtype
        # one row of three bytes a pixel: a crop with flip is then a single gather of rows, whose result is
        # channels_last already
        self.pixels = images.permute(0, 2, 3, 1).contiguous().view(-1, 3).to(device)
        self.device, self.labels = self.pixels.device, labels.to(device)
        # whole maps and not three numbers, so that the arithmetic runs over long rows
        self.scale = (1 / (255 * torch.tensor(std))).to(device).expand(SIDE, SIDE, 3).contiguous()
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).to(device).expand(SIDE, SIDE, 3).contiguous()

    def draw(self, epoch: int) -> Iterator[Tensor]:
        """The batches of ``epoch`` as :meth:`take` wants them, on the device: from (seed, stream, epoch)
        alone, whatever ran before.

        One (B, 4) int64 tensor a step, a row an image: which, top and left of its crop in the padded image, 1
        if it is flipped.
        """
        random, (rank, world) = generator(self.seed, self.stream, epoch), self.share
        order = torch.randperm(self.count, generator=random)
        corner = torch.randint(0, 2 * PAD + 1, (2, self.count, 1), generator=random)
        flipped = torch.randint(0, 2, (self.count, 1), generator=random) * self.flip
        params = torch.cat([order[:, None], corner[0], corner[1], flipped], 1).to(self.pixels.device)
        for i in range(len(self)):
            yield params[i * self.joined : (i + 1) * self.joined].tensor_split(world)[rank]

    def take(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """(images, labels) of one batch of :meth:`draw`. Nothing waits for the device, and no shape depends
        on what was drawn.
        """
        which, top, left, flipped = params.unbind(1)
        line = torch.arange(SIDE, device=params.device)
        rows = line + (top - PAD)[:, None]
        columns = torch.where(flipped[:, None] == 1, SIDE - 1 - line, line) + (left - PAD)[:, None]
        return self._gather(which, rows, columns), self.labels[which]

    def inputs(self, params: Tensor) -> tuple[Tensor, ...]:
        """(images, labels, index) of one batch of :meth:`draw`, as ``fastkd.Distillation`` takes them."""
        return (*self.take(params), params[:, 0])

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The (images, labels) of ``epoch``."""
        return map(self.take, self.draw(epoch))

    def test(self, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are: (images, labels)."""
        begins = range(0, self.count - (self.batch_size - 1) * self.drop_last, self.batch_size)
        for begin in begins[share[0] :: share[1]]:
            part = slice(begin, min(begin + self.batch_size, self.count))
            raw = self.pixels[part.start * SIDE * SIDE : part.stop * SIDE * SIDE]
            yield self._normalized(raw), self.labels[part]

    def _gather(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Images ``which`` (B,) at coordinates ``rows`` and ``columns`` (B, 32), 4 beyond the border."""
        top, left = _reflected(rows), _reflected(columns)
        places = (which[:, None] * SIDE**2 + top * SIDE)[:, :, None] + left[:, None, :]
        raw = self.pixels.index_select(0, places.view(-1))
        if self.pad_mode == "zero":
            raw = raw * ((top == rows)[:, :, None] & (left == columns)[:, None, :]).view(-1, 1)
        return self._normalized(raw)

    def _normalized(self, raw: Tensor) -> Tensor:
        images = raw.view(-1, SIDE, SIDE, 3).to(torch.float32).mul_(self.scale).add_(self.shift)
        return images.to(self.dtype).permute(0, 3, 1, 2)


def _reflected(places: Tensor) -> Tensor:
    """Coordinates mirrored at 0 and 31 without repeating the border, as "reflect" padding has it."""
    return SIDE - 1 - (SIDE - 1 - places.abs()).abs()
