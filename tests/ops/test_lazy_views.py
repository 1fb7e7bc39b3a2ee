"""Views whose numbers are not those in memory.

PyTorch negates ``z.conj().imag`` when an operator reads it; a kernel must not forget to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from support import KERNELS, place
from torch import Tensor

import fastkd
from fastkd.ops.batch_norm import batch_norm

MAP = {"p": 1, "signed": True}


def negative(backend: str, *shape: int) -> Tensor:
    """A view with the negative bit, strided as imaginary parts are, where the backend's kernels run."""
    x = place(torch.randn(shape, dtype=torch.complex64), backend).conj().imag
    assert x.is_neg()
    return x


def checked(backend: str, fn: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> None:
    """Results, and gradients for negative upstream gradients, are those of the same numbers in memory."""
    results = []
    upstreams: list[Tensor] = []
    for resolve in (False, True):
        leaves = [(x.resolve_neg() if resolve else x).detach().requires_grad_() for x in tensors]
        assert [x.is_neg() for x in leaves] == [x.is_neg() and not resolve for x in tensors]
        with fastkd.use_backend(backend):
            out = fn(*leaves)
            outputs = (out,) if isinstance(out, Tensor) else out
            if not upstreams:
                upstreams = [negative(backend, *y.shape) for y in outputs]
            given = [g.resolve_neg() if resolve else g for g in upstreams]
            results.append([*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, given)])
    # another layout sums in another order
    for lazy, plain in zip(*results, strict=True):
        torch.testing.assert_close(lazy.resolve_neg(), plain, rtol=2e-5, atol=1e-6 * plain.abs().max().item())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("p, signed", [(1, True), (2, False), (3, True)])
def test_maps_and_taps_of_negative_views(backend, p, signed):
    options = {"p": p, "signed": signed}
    x = negative(backend, 2, 6, 5, 4)
    checked(backend, lambda x: fastkd.attention_map(x, **options), [x])
    checked(backend, lambda x: fastkd.tap(x, **options), [x])
    checked(backend, lambda x, r: fastkd.relu_tap(x, r, **options), [x, negative(backend, 2, 6, 5, 4)])
    checked(
        backend,
        lambda x, r: fastkd.relu_tap(x, r, **options),
        [x.resolve_neg(), negative(backend, 2, 6, 5, 4)],
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("teacher_size, pool", [(5, "before"), (3, "before"), (3, "after")])
@pytest.mark.parametrize("p, signed", [(2, False), (3, True)])
def test_attention_transfer_of_negative_views(backend, teacher_size, pool, p, signed):
    student, teacher = negative(backend, 2, 6, 5, 5), negative(backend, 2, 4, teacher_size, teacher_size)
    for tensors in ([student, teacher], [student.resolve_neg(), teacher], [student, teacher.resolve_neg()]):
        checked(
            backend, lambda s, t: fastkd.attention_transfer_loss(s, t, p, signed=signed, pool=pool), tensors
        )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("given", ["student_is_map", "teacher_is_map"])
def test_negative_views_as_maps(backend, given):
    tensors = negative(backend, 2, 6, 5, 5), negative(backend, 2, 5, 5)
    if given == "student_is_map":
        tensors = tensors[::-1]
    checked(backend, lambda s, t: fastkd.attention_transfer_loss(s, t, **{given: True}), tensors)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
def test_fsp_of_negative_views(backend, distance):
    student = [negative(backend, 2, c, n, n) for c, n in ((6, 6), (5, 6), (4, 3))]
    teacher = [negative(backend, 2, c, n, n) for c, n in ((6, 6), (5, 6), (4, 3))]
    checked(backend, fastkd.fsp_matrix, student[:2])
    checked(backend, fastkd.fsp_matrix, [student[0].resolve_neg(), student[2]])
    for lazy in ("student", "teacher", "both"):
        chains = [
            x if lazy in (name, "both") else x.resolve_neg()
            for name, side in zip(("student", "teacher"), (student, teacher))
            for x in side
        ]
        checked(backend, lambda *x: fastkd.fsp_loss(x[:3], x[3:], distance=distance), chains)
    # matrices larger than the features: Triton keeps less
    wide = [negative(backend, 1, c, 2, 2) for c in (24, 20, 24, 20)]
    checked(backend, lambda *x: fastkd.fsp_loss(x[:2], x[2:], distance=distance), wide)


def test_soft_targets_of_negative_views():
    checked("auto", fastkd.kd_loss, [negative("cpp", 4, 10), negative("cpp", 4, 10)])


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_of_negative_views(cpp, relu):
    # dense, which imaginary parts are not: only such go to the operator
    x, r = (torch._neg_view(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)) for _ in range(2))
    assert x.is_neg() and x.is_contiguous(memory_format=torch.channels_last)
    checked("cpp", lambda x, r: batch_norm(torch.nn.BatchNorm2d(8), x, r, relu=relu), [x, r])


def test_addition_and_relu_in_place_of_negative_views(cpp):
    memory = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    residual = torch._neg_view(torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last))
    want = torch.relu(-memory + residual)
    got = torch.ops.fastkd.add_relu_(torch._neg_view(memory), residual)
    assert torch.equal(got, want) and torch.equal(-memory, want)


@pytest.mark.parametrize("backend", KERNELS)
def test_complex_features_are_refused(backend):
    z = torch.randn(2, 6, 5, 4, dtype=torch.complex64)
    for x in (z, z.conj()):
        with fastkd.use_backend(backend), pytest.raises(TypeError, match="complex64"):
            fastkd.attention_map(place(x, backend))


def test_a_view_of_the_same_strides_is_not_taken_for_a_negative_one(triton):
    """The plans that are kept for shapes and strides serve both."""
    z = triton(torch.randn(2, 6, 5, 4, dtype=torch.complex64))
    maps = [
        fastkd.attention_map(x, **MAP)
        for x in random.sample([z.imag, z.conj().imag, z.imag, z.conj().imag], 4)
    ]
    ordinary = fastkd.attention_map(z.imag.clone(), **MAP)
    assert {torch.allclose(m, ordinary, rtol=1e-5, atol=1e-6) for m in maps} == {True, False}
