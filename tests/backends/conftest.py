"""Fixtures for the CUDA library, which runs on a GPU or, thread by thread, on a CPU."""

from __future__ import annotations

import emulated
import pytest
from support import KERNELS, place

import fastkd
from fastkd import native


def pytest_collection_modifyitems(items):
    """Tests of what must be no fault come last: on a GPU a fault fails all that its process does after it."""
    items.sort(key=lambda item: "no_fault" in item.name)


@pytest.fixture(params=KERNELS[2:])
def cuda(request):
    """The CUDA library serves every call; puts a tensor where its kernels run."""
    with fastkd.use_backend("cuda"):
        yield lambda x: place(x, "cuda")


@pytest.fixture
def cuda_launches(cuda):
    """Gives the CUDA library's kernels that were launched since it was asked last."""
    if not native.EMULATED:
        pytest.skip("launches are counted where kernels are emulated")
    emulated.launched()
    return emulated.launched
