"""What a gradient of FSP is the sum of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.kernels.fsp.saved import SQUARES, common_size


@dataclass(frozen=True)
class Term:
    """M x for a feature x and a saved matrix M, or one that is recomputed; or what `fsp/low_rank.py` makes of
    saved squares and both chains.
    """

    common: tuple[int, ...]
    # places of features: x; a stage of student and teacher; x and the factors of both matrices
    xs: tuple[int, ...]
    m: int  # place of what was saved
    numbers: tuple[int, ...]  # see the kernels: of strides of M, of squares, or of factors of columns
    depth: int  # summed over
    strides: tuple[
        tuple[int, ...], ...
    ] = ()  # of a saved square and of its transpose: sample, row, positions
    left: bool = False
    sign: int = 0
    # of a matrix recomputed: what the features of student and teacher are pooled to
    factors: tuple[tuple[int, ...], ...] = ()

    @property
    def kind(self) -> int:
        """Of a matrix saved (0), of squares (1), of a matrix recomputed (2): `fsp/gradient_kernels.py`."""
        return 1 if self.strides else 2 if self.factors else 0


def term_of(
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    i: int,
    pair: int,
    places: dict[int, tuple[int, ...]],
    *,
    teacher: bool,
) -> Term:
    """The term of a gradient, stage i's, that comes from a pair. tensors: the chain's, then others; places:
    of stages of both chains.
    """
    left, m = i == pair, saved[pair]
    other = pair + 1 if left else pair
    common = common_size(tensors[pair], tensors[pair + 1])
    if m.dim() == 3:
        n, a, b = m.stride()
        return Term(common, (other,), pair, (n, a, b) if left else (n, b, a), tensors[other].shape[1])
    if m.dim() == 2:
        student, of_teacher = ([places[stage][chain] for stage in (i, other)] for chain in (0, 1))
        factors = tuple([common_size(*(tensors[j] for j in side)) for side in (student, of_teacher)])
        numbers = (*m.stride(), *(math.prod(size) for size in factors))
        return Term(
            common,
            (other, *student, *of_teacher),
            pair,
            numbers,
            tensors[other].shape[1],
            left=left,
            factors=factors,
        )
    n, square, row, column = m.stride()
    steps = torch.empty(common, device="meta").stride()
    strides = [(n, one, *[step * of for of in steps]) for one, step in ((row, column), (column, row))]
    # A takes Q, B takes P: of the student Q00 and Q01^T, P00 + P01 and P01^T + P11; of the teacher Q00 - Q01
    # and Q01^T - Q11, P01 and P11
    first = (3 if left else 0) + (teacher and not left)
    sign = 0 if teacher != left else -1 if teacher else 1
    return Term(
        common, places[i], pair, (first * square, square), math.prod(common), tuple(strides), left, sign
    )


def check_saved(m: Tensor, a: Tensor, b: Tensor, name: str) -> None:
    positions = math.prod(common_size(a, b))
    shapes = {2: (b.shape[1],), 4: (SQUARES, positions, positions)}
    shape = (a.shape[0], *shapes.get(m.dim(), (a.shape[1], b.shape[1])))
    if m.dtype != torch.float32 or m.shape != shape or m.device != a.device:
        raise ValueError(f"{name} is {tuple(m.shape)} {m.dtype} on {m.device}, wanted {shape} float32")
