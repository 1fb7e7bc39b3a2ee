"""Attention transfer over maps that a tap has made."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support import (
    DENSE,
    KERNEL_DTYPES,
    KERNELS,
    LAYOUTS,
    check_loss,
    drawn,
    dtypes,
    evaluate,
    make,
    ref,
    some_shape,
)

import fastkd

F64 = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("difference", ["squared", "l2"])
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_loss_takes_maps_of_the_student(backend, dtype, difference):
    for other in dtypes(backend) if backend == "cpp" else (drawn(backend, None),):
        loss_over_maps_matches(backend, (dtype, other), difference)


def loss_over_maps_matches(backend, pair, difference):
    n = random.choice((1, 3))
    student = [
        make((n, *some_shape()[2:]), pair[0], random.choice(("contiguous", "reversed", "stepped")))
        for _ in range(2)
    ]
    teacher = [
        make((n, random.choice((1, 5, 19)), *s.shape[1:]), pair[1], random.choice((*DENSE, "stepped")))
        for s in student
    ]
    switches = dict(
        difference=difference,
        student_is_map=True,
        weights=[2.0, 0.5],
        weight=10.0,
        channel_reduce=random.choice(("mean", "sum")),
    )
    check_loss(backend, "attention_transfer_loss", student, teacher, **switches)
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        [ref.attention_map(t).to(t.dtype) for t in teacher],
        teacher_is_map=True,
        **switches,
    )


@pytest.mark.parametrize("pool, pool_mode", list(itertools.product(["before", "after"], ["avg", "max"])))
@pytest.mark.parametrize("backend", KERNELS)
def test_a_students_map_may_be_smaller_than_the_teacher(backend, pool, pool_mode):
    student, teacher = (
        make((3, 4, 5), random.choice(dtypes(backend))),
        make((3, 7, 9, 5), random.choice(dtypes(backend)), random.choice(LAYOUTS[:6])),
    )
    check_loss(
        backend,
        "attention_transfer_loss",
        [student],
        [teacher],
        student_is_map=True,
        pool=pool,
        pool_mode=pool_mode,
    )


def test_a_loss_over_tapped_maps_is_the_loss_over_features():
    s, t = ([make((4, c, n, n), F64) for c, n in ((3, 8), (5, 4))] for _ in range(2))

    def tapped(m, s, t):
        return m.attention_transfer_loss(
            [m.tap(x)[1] for x in s], [m.tap(x)[1] for x in t], student_is_map=True, teacher_is_map=True
        )

    want = evaluate(lambda *x: ref.attention_transfer_loss(x[:2], x[2:]), [*s, *t])
    for m in (fastkd, ref):
        got = evaluate(lambda *x: tapped(m, x[:2], x[2:]), [*s, *t])
        torch.testing.assert_close((got.output, got.grads), (want.output, want.grads), rtol=1e-9, atol=1e-12)
    module = fastkd.AttentionTransfer(student_is_map=True, weight=2.0)
    torch.testing.assert_close(module([fastkd.tap(x)[1] for x in s], t), 2 * want.output)
