"""Inputs of the FSP tests."""

from __future__ import annotations

import random

import torch
from support import check, ref

import fastkd

SUMS = ("aten::add.Tensor",)  # autograd's own, where one tensor stands at two places
DISTANCES = ("squared", "frobenius", "column_l2")


def matrix_check(backend, a, b, *, upstream=None, needs=None, **switches):
    if upstream is None:
        upstream = torch.randn(a.shape[0], a.shape[1], b.shape[1])
    ours, exact = (lambda a, b, f=f: f(a, b, **switches) for f in (fastkd.fsp_matrix, ref.fsp_matrix))
    terms = ref.fsp_matrix(a.abs().double(), b.abs().double(), **switches).max().item()
    return check(backend, ours, exact, [a, b], needs, upstream, output_terms=terms)


def size(dims: int, low: int = 1, high: int = 11) -> list[int]:
    return [random.randint(low, high) for _ in range(dims)]
