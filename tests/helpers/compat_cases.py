"""Formulas of two toolkits' losses, and inputs for them."""

from __future__ import annotations

import formulas
import torch
import torch.nn.functional as F
from support import evaluate, values

F64 = torch.float64


def same(ours, theirs, tensors) -> None:
    a, b = evaluate(ours, tensors), evaluate(theirs, tensors)
    torch.testing.assert_close(a.output, b.output, rtol=1e-10, atol=0)
    torch.testing.assert_close(a.grads, b.grads, rtol=1e-9, atol=1e-13)


def maps(*shapes):
    return [values(shape, F64) for shape in shapes]


def relations(x):
    """Distances of all pairs divided by their mean, and the cosines at j of all triples (i, j, k)."""
    x = x.flatten(1)
    size = len(x)
    apart = [[(x[i] - x[j]).norm() for j in range(size)] for i in range(size)]
    mean = sum(apart[i][j] for i in range(size) for j in range(size) if i != j) / (size * (size - 1))
    zero = x.new_zeros(())
    distances = [apart[i][j] / mean if i != j else zero for i in range(size) for j in range(size)]
    cosines = [
        (x[i] - x[j]) @ (x[k] - x[j]) / (apart[i][j] * apart[k][j]) if j not in (i, k) else zero
        for i in range(size)
        for j in range(size)
        for k in range(size)
    ]
    return torch.stack(distances), torch.stack(cosines)


def rkd(s, t, distance, angle):
    pairs = zip((distance, angle), relations(s), relations(t))
    return sum(factor * F.smooth_l1_loss(a, b) for factor, a, b in pairs)


def hcl(s, t):
    """Of one level of 6 x 6 or 8 x 8: full size, 4 x 4, 2 x 2, 1 x 1 with weights 1, 1/2, 1/4, 1/8."""
    total = sum(
        weight * F.mse_loss(formulas.pool(s, size, "avg"), formulas.pool(t, size, "avg"))
        for weight, size in ((1, s.shape[2:]), (0.5, (4, 4)), (0.25, (2, 2)), (0.125, (1, 1)))
    )
    return total / 1.875
