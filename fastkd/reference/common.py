"""What the formulas share: dtypes, pooling, powers, norms and sums over stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks

_POOLS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "avg": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    "max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}


def accumulator(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype in which a call over these tensors accumulates and answers."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def widen(*tensors: Tensor) -> list[Tensor]:
    dtype = accumulator(tensors)
    return [x.to(dtype) for x in tensors]


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    # asked of the tensor: PyTorch 2.11 does not compile torch.amp.is_autocast_available
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def smaller(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [min(i, j) for i, j in zip(a, b, strict=True)]


def pool_to(x: Tensor, size: list[int], mode: str) -> Tensor:
    return x if list(x.shape[2:]) == size else _POOLS[mode][len(size) - 1](x, size)


def channel_power_sum(x: Tensor, p: float, channel_reduce: str, signed: bool) -> Tensor:
    # a number that only a graph knows is a tensor here: as a float, PyTorch 2.11 asks whether it is 2
    p = torch.as_tensor(p, dtype=x.dtype) if checks.known_to_graph(p) else float(p)  # type: ignore[assignment]
    # a graph has no second derivative, and would be compiled for even powers and for others apart
    if torch.compiler.is_compiling():
        power = (x if signed else x.abs()).pow(p)
        return power.mean(1) if channel_reduce == "mean" else power.sum(1)
    # an even power needs no absolute value, and without it the second derivative at 0 is right
    base = x if signed or p % 2 == 0 else x.abs()
    if 1 < p < 2:  # the first derivative at 0 is 0, the second has no limit: taken as 0, as that of abs is
        zero = base == 0
        power = base.masked_fill(zero, 1).pow(p).masked_fill(zero, 0)
    else:
        power = base.pow(p)
    return power.mean(1) if channel_reduce == "mean" else power.sum(1)


def vector_norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``torch.linalg.vector_norm``, ``dim`` kept, but a constant at 0: its second derivative there is NaN."""
    if torch.compiler.is_compiling():  # a graph has no second derivative
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    zero = torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True) == 0
    return torch.linalg.vector_norm(x.masked_fill(zero, 1), dim=dim, keepdim=True).masked_fill(zero, 0)


def normalized_map(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    norm = vector_norm(q, tuple(range(1, q.dim())))
    return q / (norm.clamp_min(float(eps)) if eps_mode == "clamp" else norm + float(eps))


def stage_factors(count: int) -> list[float]:
    """1 for the last stage, 1/2 for the one before it, and so on."""
    return [0.5 ** (count - 1 - i) for i in range(count)]


def combined(terms: list[Tensor], weights: Sequence[float] | None, reduce: str, weight: float) -> Tensor:
    if weights is not None:
        terms = [float(w) * term for w, term in zip(weights, terms, strict=True)]
    total, weight = torch.stack(terms).sum(), float(weight)
    return total * (weight / len(terms) if reduce == "mean" else weight)
