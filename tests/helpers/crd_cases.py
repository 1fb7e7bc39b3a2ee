"""CRD by hand, and inputs for it."""

from __future__ import annotations

import torch


def unit(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def by_hand(student, teacher, student_bank, teacher_bank, rows, temperature=0.07, normalizers=None, eps=1e-7):
    """Score by score in Python, with the logarithms as they are published; gradients by autograd. (loss,
    normalizers).
    """
    n, k, size = len(rows), rows.shape[1] - 1, len(student_bank)
    total, found = 0, []
    for i, (x, bank) in enumerate(((student, teacher_bank), (teacher, student_bank))):
        odds = [
            [torch.exp(torch.dot(x[b], bank[row]) / temperature) for row in rows[b].tolist()]
            for b in range(n)
        ]
        z = 0 if normalizers is None else float(normalizers[i])
        if not z > 0:
            z = sum(odd.item() for row in odds for odd in row) / (n * (k + 1)) * size
        for first, *rest in odds:
            total = total - torch.log(first / z / (first / z + k / size + eps))
            for odd in rest:
                total = total - torch.log(k / size / (odd / z + k / size + eps))
        found.append(z)
    return total / n, torch.tensor(found, dtype=torch.float64)


def case(n=4, k=5, size=9, width=3, dtype=torch.float64, seed=0):
    """(student, teacher, both banks, rows)."""
    made = torch.Generator().manual_seed(seed)
    vectors = [
        unit(torch.randn(count, width, generator=made, dtype=torch.float64)).to(dtype)
        for count in (n, n, size, size)
    ]
    return (*vectors, torch.randint(size, (n, k + 1), generator=made))
