"""Calls of the Triton launchers of losses of embeddings, by name: as triton_cases.py has of features."""

from __future__ import annotations

import torch

from fastkd import kernels


def crd(
    count: int,
    drawn: int,
    size: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    needs: tuple[bool, bool] = (True, True),
) -> None:
    embeddings = [torch.empty(count, width) for _ in range(2)]
    banks = [torch.empty(size, width, dtype=dtype) for _ in range(2)]
    rows = torch.empty(count, drawn + 1, dtype=torch.int64)
    kernels.launcher("crd_pass")(*embeddings, *banks, rows, torch.empty(2), 0.07, 1e-7, 1.0, *needs)


CASES = {
    "crd": lambda: crd(64, 16_384, 50_000, 128),
    "crd bf16": lambda: crd(64, 16_384, 50_000, 128, torch.bfloat16),
    "crd fp16, student": lambda: crd(8, 2000, 4000, 256, torch.float16, (True, False)),
    "crd loss": lambda: crd(64, 16_384, 50_000, 128, needs=(False, False)),
    "crd odd": lambda: crd(3, 500, 900, 37),
    "crd narrow": lambda: crd(3, 5000, 900, 1),
    "crd wide": lambda: crd(8, 500, 900, 4096),
    "crd wider": lambda: crd(8, 500, 900, 6000),
}
