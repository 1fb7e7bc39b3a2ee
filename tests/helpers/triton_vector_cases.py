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


def rkd(
    count: int,
    widths: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    needs: tuple[bool, bool] = (True, False),
    distance: float = 25.0,
    angle: float = 50.0,
) -> None:
    sides = [torch.empty(count, width, dtype=dtype) for width, dtype in zip(widths, dtypes)]
    kernels.launcher("rkd_pass")(*sides, distance, angle, *needs)


def rkd_strided() -> None:
    """Columns first, and at an address that is no multiple of 16."""
    kernels.launcher("rkd_pass")(
        torch.empty(40, 64).T, torch.empty(64 * 40 + 1)[1:].view(64, 40), 25, 50, 1, 0
    )


CASES = {
    "crd": lambda: crd(64, 16_384, 50_000, 128),
    "crd bf16": lambda: crd(64, 16_384, 50_000, 128, torch.bfloat16),
    "crd fp16, student": lambda: crd(8, 2000, 4000, 256, torch.float16, (True, False)),
    "crd loss": lambda: crd(64, 16_384, 50_000, 128, needs=(False, False)),
    "crd odd": lambda: crd(3, 500, 900, 37),
    "crd narrow": lambda: crd(3, 5000, 900, 1),
    "crd wide": lambda: crd(8, 500, 900, 4096),
    "crd wider": lambda: crd(8, 500, 900, 6000),
    "rkd": lambda: rkd(256, (512, 512)),
    "rkd small": lambda: rkd(64, (64, 64)),
    "rkd both": lambda: rkd(256, (512, 512), needs=(True, True)),
    "rkd half, odd": lambda: rkd(100, (61, 640), (torch.bfloat16, torch.float16), (True, True)),
    "rkd large": lambda: rkd(1024, (512, 2048)),
    "rkd loss": lambda: rkd(64, (64, 256), needs=(False, False)),
    "rkd distances": lambda: rkd(64, (64, 256), angle=0.0),
    "rkd angles": lambda: rkd(64, (64, 256), distance=0.0),
    "rkd narrow": lambda: rkd(3, (1, 2), needs=(False, True)),
    "rkd strided": rkd_strided,
}
