"""What the tests of RKD's Triton kernels compare with."""

from __future__ import annotations

import torch
from autograd_cases import gradients

from fastkd import reference

LAUNCHED = ["rkd_pairs_kernel", "rkd_triples_kernel", "rkd_gradient_kernel"]


def exact(student, teacher, **options):
    return gradients(
        lambda s, t: reference.rkd_loss(s, t, **options), student.double().cpu(), teacher.double().cpu()
    )


def agree(found, wanted, tolerance=1e-6, cancelled=(0, 0, 0)):
    """``cancelled``: the size of terms that cancel in each, of which four roundings may be left."""
    for got, want, terms in zip(found, wanted, cancelled, strict=False):
        assert (got.double().cpu() - want).norm() <= tolerance * want.norm() + 2.0**-22 * terms, (got, want)


def on_a_line(x, weight):
    """The size of what cancels in the gradient of samples on a line, where angles are 0 or 180 degrees."""
    lengths = torch.cdist(x.double(), x.double())
    return weight * (1 / lengths[lengths > 0]).sum().item() / len(x) ** 2 if x.shape[1] == 1 else 0
