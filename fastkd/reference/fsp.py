"""FSP matrices and their loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features
from fastkd.reference.common import combined, no_autocast, pool_to, smaller, vector_norm, widen


def _matrix(a: Tensor, b: Tensor, pool_mode: str, precision: str | None) -> Tensor:
    size = smaller(a.shape[2:], b.shape[2:])
    a, b = pool_to(a, size, pool_mode).flatten(2), pool_to(b, size, pool_mode).flatten(2)
    dtype = a.dtype
    if a.is_cuda and precision in ("ieee", "tf32x3"):
        # PyTorch's setting is global and may be tf32: float64 keeps at least the precision that was asked for
        a, b = a.double(), b.double()
    return (a @ b.transpose(1, 2)).to(dtype) / a.shape[2]


def fsp_matrix(a: Tensor, b: Tensor, *, pool_mode: str = "avg", precision: str | None = None) -> Tensor:
    """See :func:`fastkd.fsp_matrix`."""
    checks.fsp_matrix(a, b, pool_mode, precision)
    with no_autocast(a):
        a, b = widen(a, b)
        return _matrix(a, b, pool_mode, precision)


def fsp_loss(
    student: Features,
    teacher: Features,
    *,
    pool_mode: str = "avg",
    distance: str = "squared",
    pair_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """See :func:`fastkd.fsp_loss`."""
    students, teachers = checks.fsp_loss(
        student, teacher, pool_mode, distance, pair_reduce, weights, weight, precision
    )
    with no_autocast(students[0]):
        wide = widen(*students, *teachers)
        s, t = wide[: len(students)], wide[len(students) :]
        terms = []
        for i in range(len(s) - 1):
            grams = (_matrix(side[i], side[i + 1], pool_mode, precision) for side in (s, t))
            s_gram, t_gram = graphs.save_constants(*grams)
            d = s_gram - t_gram
            if distance == "squared":
                terms.append(d.square().mean())
            elif distance == "frobenius":
                terms.append(d.square().sum((1, 2)).mean())
            else:
                terms.append(vector_norm(d, 1).sum((1, 2)).mean())
        return combined(terms, weights, pair_reduce, weight)
