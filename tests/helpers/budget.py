"""How far a result may be off, and which infinities are right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from inputs import HALF
from torch import Tensor

# k of the error budget: how many ulp of its own dtype, at the largest reference value, a result may be off
# beyond twice the eager error. Half precision results are rounded once, from float32: one ulp.
ULPS = {torch.float64: 16, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}
# A float32 scalar has no larger neighbour to be measured by, and equal features (expanded ones) round all the
# same way.
SCALAR_ULPS = 8
# Where large terms cancel, what is left is no better than the terms: so many roundings of the largest, in the
# dtype of accumulation.
TERM_ULPS = 4
# Triton's bfloat16 products: two factors in a high and a low part, 2^-17 each
SPLIT = 2.0**-16


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance of neighbouring numbers of dtype at this magnitude."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(magnitude, info.tiny))[1] - 1
    return 2.0**exponent * info.eps


def within_budget(
    what: str, out: Tensor, exact: Tensor, rough: float, k: float | None = None, terms: float | Tensor = 0
) -> None:
    """max|out - exact| <= 2 rough + k ulp + terms, one ulp of out's dtype at max|exact|; no NaN, and an
    infinity just where exact rounds to that infinity. terms may be of each number.
    """
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, wanted {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert exact.isfinite().all(), f"{what}: the test itself overflows"
    info = torch.finfo(out.dtype)
    largest = exact.abs().max().item()
    top = min(largest, info.max)
    if k is None:
        k = SCALAR_ULPS if out.dim() == 0 and out.dtype == torch.float32 else ULPS[out.dtype]
    allowed = exact.new_tensor(2 * rough + k * ulp(out.dtype, top)) + terms
    assert allowed.isfinite().all(), f"{what}: eager code overflows, and nothing could be wrong"
    error = (out.double() - exact).abs()
    if largest + allowed.max().item() > info.max:
        error = error_beyond(out, exact, error, allowed - rounding_of(out.dtype, k))
    excess = (error - allowed).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(excess.argmax())
    place = (
        tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)) if exact.dim() else ()
    )
    assert excess.max().item() <= 0, (
        f"{what}: off by {error.flatten()[worst].item():.3e} at {place} ({out.flatten()[worst].item():.9g},"
        f" exact {exact.flatten()[worst].item():.9g}), allowed"
        f" {allowed.expand_as(error).flatten()[worst].item():.3e}; largest {largest:.3e},"
        f" {int((excess > 0).sum())} of {error.numel()} wrong"
    )


def rounding_of(dtype: torch.dtype, k: float) -> float:
    """The part of k ulp that is the last rounding, at dtype's largest number. A half precision result is
    rounded from float32, which is off by as many of its own ulp.
    """
    top = torch.finfo(dtype).max
    return ulp(dtype, top) - ULPS[torch.float32] * ulp(torch.float32, top) if dtype in HALF else 0.0


def error_beyond(out: Tensor, exact: Tensor, error: Tensor, slack: Tensor) -> Tensor:
    """The error where a number may be beyond the largest of out's dtype. It is rounded to infinity from half
    an ulp above that on; what is rounded may be off by slack.
    """
    top = torch.finfo(out.dtype).max
    limit = top + ulp(out.dtype, top) / 2
    infinite = out.double() == exact.sign() * math.inf
    error = error.masked_fill(infinite & (exact.abs() + slack >= limit), 0)
    return error.masked_fill(~infinite & (exact.abs() - slack >= limit), math.inf)


def eager_error(exact: Tensor, rough: Sequence[Tensor], wide: torch.dtype) -> float:
    """The largest error of float32 eager code, or of a change of the inputs by float32's rounding: eager code
    is sometimes exact by luck.

    Where the answer is float64, its size there: what the problem's conditioning makes of float64's rounding.
    """
    error = max((other.double() - exact).abs().max().item() for other in rough)
    return error * 2.0**-29 if wide == torch.float64 else error


def one_by_one(backend: str, tensors: Sequence[Tensor], exact: Tensor) -> float:
    """What sums of equal numbers may be off, which are all rounded the same way where they are added one
    after the other.

    Each lane of a Triton program adds its channels so, on a GPU and interpreted alike; lanes are added as a
    tree, and programs in float64. The reference adds the positions of a map so, in float64, in some lanes.
    """
    most = exact.abs().max().item() if exact.numel() else 0
    if backend == "triton" and any(x.dim() > 2 and x.stride(1) == 0 for x in tensors):
        return TERM_ULPS * torch.finfo(torch.float32).eps * most
    if any(x.dtype == torch.float64 and 0 in x.stride()[2:] for x in tensors):
        return max(math.prod(x.shape[2:]) for x in tensors) / 8 * torch.finfo(torch.float64).eps * most
    return 0
