"""What the tests call equal, and how they catch a fallback. Hands on inputs.py and kernel_backends.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from inputs import DENSE, DTYPES, HALF, LAYOUTS, arrange, is_dense, make, name, place, some_shape, values
from kernel_backends import KERNEL_DTYPES, KERNEL_SAMPLES, KERNELS, cpp_missing, drawn, dtypes, gpu, missing
from recorder import FUNCTIONS, fused_only
from torch import Tensor

import fastkd
from fastkd import reference

# the reference, as it was before any test patches it
ref = SimpleNamespace(**{each: getattr(reference, each) for each in (*FUNCTIONS, "kd_loss")})


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


@dataclass
class Result:
    output: Tensor
    grads: tuple[Tensor | None, ...]


def evaluate(
    fn: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    upstream: Tensor | None = None,
) -> Result:
    """fn(*tensors) and the gradients of those that need one (all by default)."""
    needs = needs or [True] * len(tensors)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs)]
    output = fn(*leaves)
    wanted = [x for x, need in zip(leaves, needs) if need]
    if not wanted:
        return Result(output.detach(), (None,) * len(leaves))
    if upstream is None:
        upstream = torch.ones_like(output)
    grads = iter(torch.autograd.grad(output, wanted, upstream.to(output.dtype)))
    return Result(output.detach(), tuple(next(grads) if need else None for need in needs))


def fetched(result: Result) -> Result:
    """A result on the CPU, gradients in their layout."""
    return Result(result.output.cpu(), tuple(None if g is None else g.cpu() for g in result.grads))


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The distance of neighbouring numbers of dtype at this magnitude."""
    info = torch.finfo(dtype)
    exponent = math.frexp(max(magnitude, info.tiny))[1] - 1
    return 2.0**exponent * info.eps


def within_budget(
    what: str, out: Tensor, exact: Tensor, rough: float, k: float | None = None, terms: float = 0
) -> None:
    """max|out - exact| <= 2 rough + k ulp + terms, one ulp of out's dtype at max|exact|; and no NaN or
    infinity where exact has none.
    """
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, wanted {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert exact.isfinite().all(), f"{what}: the test itself overflows"
    largest = exact.abs().max().item()
    if k is None:
        k = SCALAR_ULPS if out.dim() == 0 and out.dtype == torch.float32 else ULPS[out.dtype]
    allowed = 2 * rough + k * ulp(out.dtype, largest) + terms
    error = (out.double() - exact).abs()
    worst = int(error.nan_to_num(nan=math.inf).argmax())
    place = (
        tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), exact.shape)) if exact.dim() else ()
    )
    assert error.max().item() <= allowed, (
        f"{what}: off by {error.flatten()[worst].item():.3e} at {place} ({out.flatten()[worst].item():.9g},"
        f" exact {exact.flatten()[worst].item():.9g}), allowed {allowed:.3e}; largest {largest:.3e},"
        f" {int((error > allowed).sum() + error.isnan().sum())} of {error.numel()} wrong"
    )


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


def nudged(x: Tensor) -> Tensor:
    return x.double().contiguous() * (
        1 + torch.finfo(torch.float32).eps * (2 * torch.rand(x.shape, dtype=torch.float64) - 1)
    )


def uncancelled(
    exact_fn: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needs: Sequence[bool] | None,
    upstream: Tensor | None,
) -> Result:
    """Gradients before their part along the map is subtracted, (g - y<g, y>)/n without the second term: the
    norm held constant.
    """

    def held(q: Tensor, eps: float, eps_mode: str) -> Tensor:
        norm = torch.linalg.vector_norm(q.detach(), dim=tuple(range(1, q.dim())), keepdim=True)
        return q / (norm.clamp_min(eps) if eps_mode == "clamp" else norm + eps)

    with mock.patch.object(reference.attention, "normalized_map", held):
        return evaluate(exact_fn, [x.double().contiguous() for x in tensors], needs, upstream)


def check(
    backend: str,
    fn: Callable[..., Tensor],
    exact_fn: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    upstream: Tensor | None = None,
    k: float | None = None,
    also: Sequence[str] = (),
    output_terms: float = 0,
    gradient_terms: Result | None = None,
) -> Result:
    """fn under the backend against exact_fn in float64, output and gradients, with the promised dtypes and
    strides; nothing falls back.

    output_terms: the size of the terms whose sum the output is, where they may cancel; gradient_terms: the
    same of the gradients.
    """
    placed, given = (
        [place(x, backend) for x in tensors],
        (None if upstream is None else place(upstream, backend)),
    )
    guard = fused_only(also, backend) if backend != "reference" else contextlib.nullcontext()
    with fastkd.use_backend(backend), guard:
        got = fetched(evaluate(fn, placed, needs, given))
    exact = evaluate(exact_fn, [x.double().contiguous() for x in tensors], needs, upstream)
    eager = evaluate(exact_fn, [x.float().contiguous() for x in tensors], needs, upstream)
    moved = evaluate(exact_fn, [nudged(x) for x in tensors], needs, upstream)
    whole = gradient_terms or uncancelled(exact_fn, tensors, needs, upstream)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    assert got.output.dtype == wide, f"output is {got.output.dtype}, wanted {wide}"
    term = TERM_ULPS * torch.finfo(wide).eps
    if backend in ("triton", "cuda") and all(x.dtype == torch.bfloat16 for x in tensors):
        term = SPLIT
    within_budget(
        "output",
        got.output,
        exact.output,
        eager_error(exact.output, (eager.output, moved.output), wide),
        k,
        term * output_terms + one_by_one(backend, tensors, exact.output),
    )
    for i, (x, grad, want, terms, *rough) in enumerate(
        zip(tensors, got.grads, exact.grads, whole.grads, eager.grads, moved.grads)
    ):
        if want is None:
            assert grad is None
            continue
        assert grad.dtype == x.dtype, f"gradient {i} is {grad.dtype}, its input {x.dtype}"
        if backend != "reference" and is_dense(x):
            assert grad.stride() == torch.empty_like(x).stride(), (
                f"gradient {i} has strides {grad.stride()}, its input {x.stride()}"
            )
        what = f"gradient {i} of shape {tuple(x.shape)}, strides {x.stride()}, {x.dtype}"
        more = one_by_one(backend, tensors, want)
        within_budget(
            what, grad, want, eager_error(want, rough, wide), k, term * terms.abs().max().item() + more
        )
    return got


# the losses as functions of a flat list of tensors, student's stages first


def paired(loss: Callable[..., Tensor], stages: int, **switches: object) -> Callable[..., Tensor]:
    return lambda *tensors: loss(list(tensors[:stages]), list(tensors[stages:]), **switches)


def apart(
    student: Sequence[Tensor], teacher: Sequence[Tensor], switches: dict[str, object]
) -> tuple[list[Tensor], dict[str, object]]:
    """The same chains with positive student and negative teacher matrices, whose difference adds, and
    positive weights.
    """
    chains = [[x.double().abs() for x in side] for side in (student, teacher)]
    chains[1] = [-x if i % 2 else x for i, x in enumerate(chains[1])]
    weights = [abs(w) for w in switches.get("weights") or []] or None
    return [*chains[0], *chains[1]], {
        **switches,
        "weight": abs(switches.get("weight", 1.0)),
        "weights": weights,
    }


def fsp_terms(student: Sequence[Tensor], teacher: Sequence[Tensor], switches: dict[str, object]) -> float:
    """What the rounding of each product, all in one direction, would make of the FSP loss: 2 |d| |products|
    for a squared distance.
    """
    chains, positive = apart(student, teacher, switches)
    most = paired(ref.fsp_loss, len(student), **positive)(*chains).item()
    if switches.get("distance") == "column_l2":
        return most
    loss = ref.fsp_loss([x.double() for x in student], [x.double() for x in teacher], **positive).item()
    return 2 * math.sqrt(loss * most)


def check_loss(
    backend: str,
    function: str,
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    needs=None,
    upstream=None,
    k=None,
    **switches,
) -> Result:
    fns = [paired(getattr(module, function), len(student), **switches) for module in (fastkd, ref)]
    terms, gradients = 0.0, None
    if function == "fsp_loss":
        terms = fsp_terms(student, teacher, switches)
        # channels that are all the same round alike: no error of one entry makes up for another's
        if any(x.shape[1] > 1 and x.stride(1) == 0 for x in (*student, *teacher)):
            terms *= 2
        # there the gradient does not depend on how large the difference is
        if switches.get("distance") != "column_l2":
            chains, positive = apart(student, teacher, switches)
            sign = None if upstream is None else upstream.abs()
            gradients = evaluate(
                paired(ref.fsp_loss, len(student), **positive), [x.contiguous() for x in chains], needs, sign
            )
    return check(
        backend, *fns, [*student, *teacher], needs, upstream, k, output_terms=terms, gradient_terms=gradients
    )
