"""Random numbers that depend on a seed and a purpose only, not on what was drawn before."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for (seed, purpose...), so that every epoch's random numbers can be drawn again from
    its number alone.
    """
    # a NumPy integer is written in another way than the same integer of Python's
    digest = hashlib.blake2b(repr((operator.index(seed), *purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def seeded(seed: int, *purpose: object) -> Iterator[None]:
    """Inside, PyTorch's CPU generator is set for (seed, purpose...); afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, *purpose).initial_seed())
        yield
