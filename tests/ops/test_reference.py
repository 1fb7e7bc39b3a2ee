"""The reference itself: fastkd.reference against formulas written by hand, in float64, and its derivatives
against finite differences.
"""

from __future__ import annotations

import inspect
import itertools
import random

import formulas
import pytest
import torch
from support import DTYPES, LAYOUTS, arrange, name, some_shape, values

import fastkd
from fastkd import reference

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
POWERS = (1, 1.5, 2, 2.7, 3, 4)


def close(a: object, b: object) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b, dtype=F64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "function", ["attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss", "kd_loss"]
)
def test_reference_has_the_public_signature(function):
    ours, ref = (inspect.signature(getattr(module, function)) for module in (fastkd, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in ref.parameters.values()
    ]


@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("channel_reduce", ["mean", "sum"])
@pytest.mark.parametrize("p", POWERS)
def test_map_is_the_written_formula(p, channel_reduce, signed, eps_mode):
    x = values(some_shape(), F64, "positive" if signed and p != int(p) else "normal")
    switches = dict(
        channel_reduce=channel_reduce, signed=signed, eps=10.0 ** random.randint(-12, 0), eps_mode=eps_mode
    )
    for normalize in (True, False):
        close(
            reference.attention_map(x, p, normalize=normalize, **switches),
            formulas.attention_map(x, p, normalize=normalize, **switches),
        )


def sizes(dims: int, which: str) -> tuple[list[int], list[int]]:
    """Spatial sizes of student and teacher: one of the two larger, or each in another dimension."""
    big, small = [random.randint(5, 9) for _ in range(dims)], [random.randint(1, 4) for _ in range(dims)]
    if which == "mixed" and dims > 1:
        big[0], small[0] = small[0], big[0]
    return (small, big) if which == "teacher" else (big, small)


@pytest.mark.parametrize(
    "difference, stage_reduce", list(itertools.product(["squared", "l2"], ["sum", "mean"]))
)
@pytest.mark.parametrize("pool, pool_mode", list(itertools.product(["before", "after"], ["avg", "max"])))
@pytest.mark.parametrize("which", ["student", "teacher", "mixed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transfer_loss_is_the_written_formula(dims, which, pool, pool_mode, difference, stage_reduce):
    n, student, teacher = random.randint(1, 3), [], []
    for _ in range(2):
        s, t = sizes(dims, which)
        student.append(values((n, random.randint(1, 5), *s), F64))
        teacher.append(values((n, random.randint(1, 5), *t), F64))
    shared = dict(
        channel_reduce=random.choice(["mean", "sum"]),
        eps_mode=random.choice(["clamp", "add"]),
        eps=0.1,
        pool_mode=pool_mode,
        difference=difference,
        stage_reduce=stage_reduce,
        weights=[0.25, 3.0],
        weight=7.0,
    )
    p = random.choice(POWERS)
    close(
        reference.attention_transfer_loss(student, teacher, p, pool=pool, **shared),
        formulas.attention_transfer_loss(student, teacher, p, pool_when=pool, **shared),
    )


@pytest.mark.parametrize("difference", ["squared", "l2"])
@pytest.mark.parametrize("pool", ["before", "after"])
def test_teacher_maps_are_taken_as_they_are(pool, difference):
    student = [values((2, 3, 6, 5), F64), values((2, 4, 3, 7), F64)]
    maps = [
        formulas.attention_map(values((2, 3, 6, 5), F64)),
        formulas.attention_map(values((2, 9, 2, 3), F64)),
    ]
    ours = reference.attention_transfer_loss(
        student, maps, teacher_is_map=True, pool=pool, difference=difference
    )
    close(
        ours,
        formulas.attention_transfer_loss(
            student, maps, teacher_is_map=True, pool_when=pool, difference=difference
        ),
    )


def test_one_tensor_is_one_stage():
    s, t = values((2, 3, 4, 4), F64), values((2, 5, 4, 4), F64)
    assert reference.attention_transfer_loss(s, t) == reference.attention_transfer_loss([s], (t,))


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("which", ["student", "teacher", "mixed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fsp_matrix_is_the_written_formula(dims, which, pool_mode):
    s, t = sizes(dims, which)
    a, b = values((2, random.randint(1, 5), *s), F64), values((2, random.randint(1, 5), *t), F64)
    close(reference.fsp_matrix(a, b, pool_mode=pool_mode), formulas.fsp_matrix(a, b, pool_mode))


@pytest.mark.parametrize("pool_mode, pair_reduce", list(itertools.product(["avg", "max"], ["sum", "mean"])))
@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
@pytest.mark.parametrize("same", [True, False])
def test_fsp_loss_is_the_written_formula(same, distance, pool_mode, pair_reduce):
    channels, n = [random.randint(1, 5) for _ in range(4)], random.randint(1, 3)
    student = [values((n, c, *size), F64) for c, size in zip(channels, [(6, 5), (6, 5), (3, 7), (1, 2)])]
    teacher = [
        values(s.shape if same else (n, s.shape[1], random.randint(1, 7), random.randint(1, 7)), F64)
        for s in student
    ]
    switches = dict(
        pool_mode=pool_mode, distance=distance, pair_reduce=pair_reduce, weights=[1.5, 0.5, 2.0], weight=0.3
    )
    close(reference.fsp_loss(student, teacher, **switches), formulas.fsp_loss(student, teacher, **switches))


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_kd_loss_is_the_written_formula(reduction):
    s, t = values((5, 11), F64) * 3, values((5, 11), F64) * 3
    temperature = random.choice((1.0, 2.5, 4.0))
    close(
        reference.kd_loss(s, t, temperature, reduction=reduction, weight=2.0),
        formulas.kd_loss(s, t, temperature, reduction, 2.0),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_reference_computes_in_wide_dtype_whatever_the_layout(dtype, layout):
    x, t = (arrange(values((2, 3, 5, 4), dtype), layout) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    for ours, exact in (
        (reference.attention_map(x), formulas.attention_map(x.to(F64))),
        (reference.fsp_matrix(x, t), formulas.fsp_matrix(x.to(F64), t.to(F64))),
        (
            reference.attention_transfer_loss(x, t),
            torch.tensor(formulas.attention_transfer_loss([x.to(F64)], [t.to(F64)]), dtype=F64),
        ),
        (
            reference.fsp_loss([x, x], [t, t]),
            torch.tensor(formulas.fsp_loss([x.to(F64)] * 2, [t.to(F64)] * 2), dtype=F64),
        ),
    ):
        assert ours.dtype == wide
        torch.testing.assert_close(ours.to(F64), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pool, pool_mode", [("before", "avg"), ("before", "max"), ("after", "avg"), ("after", "max")]
)
def test_transfer_loss_is_differentiable_twice(pool, pool_mode):
    p, difference, eps_mode = random.choice(
        [(2, "squared", "clamp"), (3, "l2", "add"), (1.5, "squared", "add"), (2.7, "l2", "clamp")]
    )
    s, t = (values(shape, F64, "positive").requires_grad_() for shape in ((2, 2, 3, 2), (2, 1, 2, 3)))

    def loss(s, t):
        return reference.attention_transfer_loss(
            s, t, p, difference=difference, eps_mode=eps_mode, eps=1e-3, pool=pool, pool_mode=pool_mode
        )

    assert torch.autograd.gradcheck(loss, (s, t)) and torch.autograd.gradgradcheck(loss, (s, t))


@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_fsp_loss_is_differentiable_twice(pool_mode, distance):
    tensors = [values(shape, F64).requires_grad_() for shape in [(2, 2, 3, 2), (2, 3, 2, 2)] * 2]

    def loss(*x):
        return reference.fsp_loss(x[:2], x[2:], pool_mode=pool_mode, distance=distance)

    assert torch.autograd.gradcheck(loss, tensors) and torch.autograd.gradgradcheck(loss, tensors)


def test_maps_matrices_and_kd_are_differentiable_twice():
    x, y = (values((2, 3, 2, 2), F64, "positive").requires_grad_() for _ in range(2))
    s, t = (values((3, 4), F64).requires_grad_() for _ in range(2))
    for fn, args in (
        (reference.attention_map, (x,)),
        (reference.fsp_matrix, (x, y)),
        (reference.kd_loss, (s, t)),
    ):
        assert torch.autograd.gradcheck(fn, args) and torch.autograd.gradgradcheck(fn, args)
