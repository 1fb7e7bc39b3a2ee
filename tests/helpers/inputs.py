"""Inputs of tests: numbers, layouts, shapes, and the device where a backend's kernels run."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DENSE = ("contiguous", "channels_last", "swapped", "reversed")
LAYOUTS = (*DENSE, "sliced", "stepped", "expanded_batch", "expanded_channels", "expanded_space")


def name(value: object) -> str:
    """A short test id."""
    return str(value).removeprefix("torch.").replace(" ", "")


def values(shape: Sequence[int], dtype: torch.dtype, kind: str = "normal") -> Tensor:
    """Feature-like numbers. "positive" keeps away from zero (fractional powers of signed maps); "relu" is
    half zeros.
    """
    x = torch.randn(tuple(shape), dtype=torch.float64)
    if kind == "positive":
        x = x.abs() + 0.1
    elif kind == "relu":
        x = x.relu()
    elif kind != "normal":
        raise ValueError(kind)
    return x.to(dtype)


def arrange(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout; an expanded layout repeats the first slice instead."""
    last = x.dim() - 1
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, last).contiguous().movedim(last, 1)
    if layout == "swapped":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":
        order = (0, 1, *range(last, 1, -1))
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        big = torch.full([size + 3 for size in x.shape], math.nan, dtype=x.dtype)
        view = big[tuple(slice(1, size + 1) for size in x.shape)]
        return view.copy_(x)
    if layout == "stepped":
        big = torch.full(
            [size if d == 0 else 2 * size for d, size in enumerate(x.shape)], math.nan, dtype=x.dtype
        )
        view = big[(slice(None), *(slice(None, None, 2) for _ in x.shape[1:]))]
        return view.copy_(x)
    dim = {"expanded_batch": 0, "expanded_channels": 1, "expanded_space": last}[layout]
    return x.narrow(dim, 0, 1).clone().expand(x.shape)


def make(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, layout: str = "contiguous", kind: str = "normal"
) -> Tensor:
    return arrange(values(shape, dtype, kind), layout)


def some_shape(n: int | None = None) -> tuple[int, ...]:
    """A small shape with odd and prime sizes, one to three of them spatial; of few positions little but
    rounding is left of a gradient.
    """
    space: list[int] = []
    while math.prod(space) < 6:
        dims = random.choice((1, 2, 2, 3))
        sizes = {1: (7, 13, 49, 67, 131), 2: (1, 2, 3, 5, 7, 8, 11, 16, 17), 3: (1, 2, 3, 5)}[dims]
        space = [random.choice(sizes) for _ in range(dims)]
    return (n or random.choice((1, 2, 3, 5)), random.choice((1, 3, 7, 8, 17, 33)), *space)


def is_dense(x: Tensor) -> bool:
    return torch.ops.aten.is_non_overlapping_and_dense(x)


def place(x: Tensor, backend: str) -> Tensor:
    """x where the backend's kernels run: those of a GPU there if there is one, in the same layout, else
    interpreted or emulated here.
    """
    if backend not in ("triton", "cuda") or not torch.cuda.is_available():
        return x
    with _disable_current_modes():  # what records a call's operations does not see these
        there = torch.empty(0, dtype=x.dtype, device="cuda")
        return there.set_(x.untyped_storage().cuda(), x.storage_offset(), x.shape, x.stride())
