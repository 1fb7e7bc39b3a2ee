"""What the FSP loss keeps of a pair for its backward pass: shapes alone, for launchers and for
fakes, without Triton.

Of a pair of features A (Ca, K) and B (Cb, K) that is dloss/dG, (N, Ca, Cb), where it is no larger than the
features. Of wide features of few positions it is many times larger (1024 by 2048 channels at 7x7: 14 times
the products' factors). There it is never in memory, and the gradients need the features of both chains.
Either six K x K matrices of the channels' sums are saved, (N, 6, K, K), from which the loss and the gradients
follow (`fsp/low_rank.py`). Or, where those six cannot take its place well, what each column of G_s - G_t is
multiplied by, (N, Cb), and the backward pass makes G_s - G_t again, tile by tile, for each gradient: for
"column_l2", whose gradient divides each column by its norm, which needs all the sums over A before those over
B are made; and for student and teacher of different sizes, where nothing is subtracted before it is
multiplied and the loss would be what is left of three large numbers.

That is Triton's rule. On a CPU, memory for a matrix is there, and four such products, from which the
student's gradients follow, are kept where they take less work (`csrc/cpu/fsp/low_rank.inl`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

SQUARES, SQUARES_ON_CPU = 6, 4


def common_size(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """What two features are pooled to."""
    return tuple([i if i <= j else j for i, j in zip(a.shape[2:], b.shape[2:])])


def matrix_shape(student: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    a, b = student
    return a.shape[0], a.shape[1], b.shape[1]


def saved_shape(student: Sequence[Tensor], teacher: Sequence[Tensor], distance: str) -> tuple[Any, ...]:
    """Of a pair, two features of each chain."""
    samples, rows, columns = matrix_shape(student)
    size = common_size(*student)
    if distance != "column_l2" and size == common_size(*teacher):
        positions = math.prod(size)
        # a feature of the student and its teacher's count as one: in half precision, two of those take the
        # bytes of a matrix's numbers
        larger = 2 * rows * columns > sum(math.prod(x.shape[1:]) for x in (*student, *teacher))
        if larger and rows * columns > SQUARES * positions * positions:
            return samples, SQUARES, positions, positions
    if 4 * rows * columns > sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in (*student, *teacher)):
        return samples, columns
    return samples, rows, columns


def saved_shape_on_cpu(
    student: Sequence[Tensor], teacher: Sequence[Tensor], distance: str, teacher_grad: bool
) -> tuple[Any, ...]:
    """The same of the C++ kernels; csrc/cpu/fsp/plan.cpp has the rule, by the work of either way."""
    samples, rows, columns = matrix_shape(student)
    every = (*student, *teacher)
    expanded = any(x.stride(1) == 0 and x.shape[1] > 1 for x in every)
    alike = all(s.shape[2:] == t.shape[2:] for s, t in zip(student, teacher))
    positions = math.prod(common_size(*student))
    served = alike and not expanded and distance != "column_l2" and not teacher_grad
    if served and 5 * (rows + columns) * positions <= 3 * rows * columns:
        return samples, SQUARES_ON_CPU, positions, positions
    return samples, rows, columns


def wide_stages(saved: Sequence[Tensor | tuple[Any, ...]]) -> list[int]:
    """The stages of a chain that the gradients need of both sides."""
    pairs = [i for i, x in enumerate(saved) if len(x if isinstance(x, tuple) else x.shape) != 3]
    return sorted({stage for i in pairs for stage in (i, i + 1)})
