"""What the tests call equal, and how they catch a fallback. Hands on budget.py, inputs.py and
kernel_backends.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from budget import SPLIT, TERM_ULPS, eager_error, one_by_one, ulp, within_budget
from fsp_columns import column_gradient_terms
from inputs import DENSE, DTYPES, HALF, LAYOUTS, arrange, is_dense, make, name, place, some_shape, values
from kernel_backends import KERNEL_DTYPES, KERNEL_SAMPLES, KERNELS, cpp_missing, drawn, dtypes, gpu, missing
from recorder import FUNCTIONS, fused_only
from torch import Tensor

import fastkd
from fastkd import reference

# the reference, as it was before any test patches it
ref = SimpleNamespace(**{each: getattr(reference, each) for each in (*FUNCTIONS, "kd_loss")})


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


def nudged(x: Tensor) -> Tensor:
    return x.double().contiguous() * (
        1 + torch.finfo(torch.float32).eps * (2 * torch.rand(x.shape, dtype=torch.float64) - 1)
    )


def largest(result: Result) -> list[float | None]:
    """The largest number of each gradient."""
    return [None if g is None else g.abs().max().item() for g in result.grads]


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
    gradient_terms: Sequence[Tensor | float | None] | None = None,
) -> Result:
    """fn under the backend against exact_fn in float64, output and gradients, with the promised dtypes and
    strides; nothing falls back.

    output_terms: the size of the terms whose sum the output is, where they may cancel; gradient_terms: the
    same of the gradients, of each or of each of its numbers.
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
    whole = gradient_terms or largest(uncancelled(exact_fn, tensors, needs, upstream))
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
        zip(tensors, got.grads, exact.grads, whole, eager.grads, moved.grads)
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
        within_budget(what, grad, want, eager_error(want, rough, wide), k, term * terms + more)
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
        if switches.get("distance") == "column_l2":
            # there the gradient does not depend on how large the difference is
            gradients = column_gradient_terms(student, teacher, upstream, **switches)
        else:
            chains, positive = apart(student, teacher, switches)
            sign = None if upstream is None else upstream.abs()
            gradients = largest(
                evaluate(
                    paired(ref.fsp_loss, len(student), **positive),
                    [x.contiguous() for x in chains],
                    needs,
                    sign,
                )
            )
    return check(
        backend, *fns, [*student, *teacher], needs, upstream, k, output_terms=terms, gradient_terms=gradients
    )
