"""Batches from a set in memory: crop, flip and normalization as batched index arithmetic, one gather a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

SIDE, PAD = 32, 4
PAD_MODES = ("reflect", "zero")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator of its own for (seed, purpose...), so that every epoch's randomness can be drawn again from its number alone."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Batches:
    """Normalized batches, channels_last and of the step's dtype, from uint8 images (N, 3, 32, 32) that stay on the device.

    ``train(epoch)`` shuffles, pads by 4 (``reflect``, or black for ``zero``), crops 32x32 at a place of each image's own and flips
    every second image on average; ``test()`` goes through the images in order and changes nothing.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, batch_size: int, seed: int = 0,
                 stream: str = "data", flip: bool = True, pad_mode: str = "reflect", drop_last: bool = False,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):  # fmt: skip
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode is {pad_mode!r}, wanted one of {', '.join(PAD_MODES)}")
        self.count, self.batch_size, self.drop_last = images.shape[0], batch_size, drop_last
        self.seed, self.stream, self.flip, self.pad_mode, self.dtype = seed, stream, flip, pad_mode, dtype
        # one row of three bytes a pixel: a crop with flip is then a single gather of rows, whose result is channels_last already
        self.pixels = images.permute(0, 2, 3, 1).contiguous().view(-1, 3).to(device)
        self.labels = labels.to(device)
        # whole maps and not three numbers, so that the arithmetic runs over long rows
        self.scale = (1 / (255 * torch.tensor(std))).to(device).expand(SIDE, SIDE, 3).contiguous()
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).to(device).expand(SIDE, SIDE, 3).contiguous()

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def train(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The (images, labels) of ``epoch``, from (seed, stream, epoch) alone, whatever ran before."""
        random, device = generator(self.seed, self.stream, epoch), self.pixels.device
        order = torch.randperm(self.count, generator=random).to(device)
        top, left = torch.randint(0, 2 * PAD + 1, (2, self.count, 1), generator=random).to(device).unbind()
        flipped = (torch.randint(0, 2, (self.count, 1), generator=random) * self.flip).to(device)
        line = torch.arange(SIDE, device=device)
        for i in range(len(self)):
            part = slice(i * self.batch_size, (i + 1) * self.batch_size)
            rows = line + (top[part] - PAD)
            columns = torch.where(flipped[part] == 1, SIDE - 1 - line, line) + (left[part] - PAD)
            yield self._gather(order[part], rows, columns), self.labels[order[part]]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are: (images, labels)."""
        for i in range(len(self)):
            part = slice(i * self.batch_size, min((i + 1) * self.batch_size, self.count))
            raw = self.pixels[part.start * SIDE * SIDE : part.stop * SIDE * SIDE]
            yield self._normalized(raw), self.labels[part]

    def _gather(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Images ``which`` (B,) at coordinates ``rows`` and ``columns`` (B, 32), which reach 4 beyond the border."""
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
