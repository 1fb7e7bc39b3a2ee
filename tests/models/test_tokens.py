"""Tokens of a transformer as a map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastkd


@pytest.mark.parametrize(
    ("grid", "prefix", "size"),
    [
        (None, 0, 16),
        (None, 1, 17),
        ((2, 8), 3, 19),
        ((np.int64(2), np.int64(8)), np.int64(3), 19),  # as from an array of sizes
    ],
)
def test_tokens_become_a_map(grid, prefix, size):
    x = torch.randn(2, size, 5, requires_grad=True)
    found = fastkd.tokens_to_map(x, grid, prefix)
    height, width = grid or (4, 4)
    assert found.shape == (2, 5, height, width) and found.data_ptr() == x[:, prefix:].data_ptr()
    for i in range(height):
        for j in range(width):
            assert torch.equal(found[:, :, i, j], x[:, prefix + i * width + j])


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (
            torch.zeros(2, 17, 5),
            {},
            ValueError,
            r"grid is None, and 17 tokens after a prefix of 0 are no square: give grid",
        ),
        (torch.zeros(2, 16, 5), {"grid": (3, 5)}, ValueError, r"grid is \(3, 5\), wanted 16 positions"),
        (torch.zeros(2, 16, 5), {"prefix": 16}, ValueError, "prefix is 16, wanted 0 to 15"),
        (torch.zeros(2, 16, 5), {"prefix": 1.0}, TypeError, "prefix is 1.0, wanted a whole number"),
        (torch.zeros(2, 16), {}, ValueError, r"x is \(2, 16\), wanted tokens \(N, L, C\)"),
        ([1], {}, TypeError, "x is list, wanted a tensor of tokens"),
        (torch.zeros(2, 0, 5), {}, ValueError, r"x is \(2, 0, 5\), wanted at least one token"),
        (torch.zeros(2, 16, 5), {"grid": 4}, TypeError, r"grid is 4, wanted \(H, W\)"),
        (torch.zeros(2, 16, 5), {"grid": "44"}, TypeError, r"grid is '44', wanted \(H, W\)"),
        (torch.zeros(2, 16, 5), {"grid": (4.0, 4.0)}, ValueError, r"grid is \(4.0, 4.0\), wanted two whole"),
        (torch.zeros(2, 16, 5), {"grid": (2, 2, 4)}, ValueError, r"grid is \(2, 2, 4\), wanted two whole"),
        (torch.zeros(2, 16, 5), {"grid": (-4, -4)}, ValueError, r"grid is \(-4, -4\), wanted 16 positions"),
    ],
)
def test_what_are_no_tokens_is_one_line(x, options, error, words):
    with pytest.raises(error, match=words) as caught:
        fastkd.tokens_to_map(x, **options)
    assert "\n" not in str(caught.value)
