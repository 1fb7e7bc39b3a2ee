"""Tokens of transformers as maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fastkd.checks.numbers import whole


def tokens_to_map(x: Tensor, grid: Sequence[int] | None = None, prefix: int = 0) -> Tensor:
    """Tokens (N, L, C) as a map (N, C, H, W), a view of them.

    Args:
        x: tokens, their positions row by row.
        grid: (H, W); None: the tokens after the prefix are a square.
        prefix: how many tokens at the beginning are not positions, such as class tokens; they are dropped.

    Equals ``x[:, prefix:].transpose(1, 2).unflatten(2, (H, W))``. Any dtype; differentiable.
    Raises: TypeError, ValueError for tokens that do not fill such a grid.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, wanted a tensor of tokens (N, L, C)")
    if x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}, wanted tokens (N, L, C)")
    if not whole(prefix):
        raise TypeError(f"prefix is {prefix!r}, wanted a whole number")
    count = x.shape[1] - prefix
    if not x.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, wanted at least one token")
    if prefix < 0 or count < 1:
        raise ValueError(f"prefix is {prefix}, wanted 0 to {x.shape[1] - 1}: x has {x.shape[1]} tokens")
    if grid is None:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"grid is None, and {count} tokens after a prefix of {prefix} are no square: give grid=(H, W)"
            )
        grid = (side, side)
    if isinstance(grid, str) or not isinstance(grid, Sequence):
        raise TypeError(f"grid is {grid!r}, wanted (H, W)")
    if len(grid) != 2 or not all(map(whole, grid)):
        raise ValueError(f"grid is {grid!r}, wanted two whole numbers (H, W)")
    height, width = grid
    if height * width != count or height < 1:
        raise ValueError(
            f"grid is {(height, width)}, wanted {count} positions: x has {x.shape[1]} tokens, {prefix} of"
            " them before the map"
        )
    return x[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
