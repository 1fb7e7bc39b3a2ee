"""The bits that a pixel becomes, of a set in memory and of a folder alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastkd.data import files, folder
from fastkd.data.loader import Batches
from fastkd.data.streaming import StreamedBatches

MEAN, STD = (torch.tensor(x)[:, None, None] for x in (folder.MEAN, folder.STD))


def in_memory(pixels):
    batches = Batches(pixels, torch.zeros(1, dtype=torch.int64), folder.MEAN, folder.STD, batch_size=1)
    return next(batches.test())[0]


def of_a_folder(pixels):
    given = torch.zeros(1, dtype=torch.int64), folder.MEAN, folder.STD
    batches = StreamedBatches(files.Paths(Path("."), ["none"]), *given, batch_size=1, sides=(32,))
    return batches._normalized(pixels.permute(0, 2, 3, 1))


@pytest.mark.parametrize("normalized", [in_memory, of_a_folder])
def test_a_pixel_is_multiplied_once_and_shifted_once(normalized):
    """Division by 255 first, as ToTensor has it, gives other last bits, and a run would not be repeated."""
    pixels = (torch.arange(1024) % 256).to(torch.uint8).view(1, 1, 32, 32).expand(1, 3, 32, 32)
    found, x = normalized(pixels), pixels.float()
    assert torch.equal(found, x * (1 / (255 * STD)) + (-MEAN / STD))
    usual = (x / 255 - MEAN) / STD
    assert not torch.equal(found, usual)
    torch.testing.assert_close(found, usual, rtol=0, atol=1e-6)
