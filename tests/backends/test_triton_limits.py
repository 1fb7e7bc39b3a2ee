"""Sizes that Triton's kernels cannot count are refused before anything is allocated or launched."""

from __future__ import annotations

import pytest
import torch
from support import missing

from fastkd import kernels
from fastkd._bits import ATTENTION, FSP

pytestmark = pytest.mark.skipif(bool(missing("triton")), reason=missing("triton"))
MAP = (2.0, "mean", False, True, 1e-12, "clamp")
TRANSFER = (ATTENTION.pack(channel_reduce="mean", pool="before"), [0.0, 2.0, 1e-12, 1.0])
CHAIN = (FSP.pack(precision="ieee"), [0.0, 1.0])


def expanded(triton, *shape):
    return triton(torch.ones(())).expand(shape)


@pytest.mark.parametrize("shape", [(1, 1, 2**30 + 1), (1, 2**30 + 1, 1), (1, 4096, 2**28)])
def test_positions_channels_and_partial_sums_of_a_sample(triton, shape):
    """The last has 8 partial sums for each of its positions."""
    x = expanded(triton, *shape)
    for call in (
        lambda: kernels.launcher("attention_map")(x, *MAP),
        lambda: kernels.launcher("attention_transfer_loss")([x], [x], *TRANSFER),
    ):
        with pytest.raises(ValueError, match="positions or channels is not served"):
            call()


@pytest.mark.parametrize("shape", [(1, 1, 2**30 + 1), (1, 2**30 + 1, 1), (1, 1, 2**16, 2**15)])
def test_features_of_fsp(triton, shape):
    """Also where they are pooled before."""
    x, small = expanded(triton, *shape), expanded(triton, 1, 1, *(1,) * (len(shape) - 2))
    for chain in ([x, x], [x, small]):
        with pytest.raises(ValueError, match="positions or channels is not served"):
            kernels.launcher("fsp_loss")(chain, chain, *CHAIN)


def test_programs_of_a_launch(triton):
    x = expanded(triton, 2**31, 1, 1)
    with pytest.raises(ValueError, match=f"map_kernel would take {2**31} programs"):
        kernels.launcher("attention_map")(x, *MAP)
