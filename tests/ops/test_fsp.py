"""fsp_matrix and fsp_loss: C++ and Triton kernels against the reference in float64, over dtypes, layouts,
shapes and every switch.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from fsp_cases import DISTANCES, size
from recorder import fused_only
from support import (
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    arrange,
    check_loss,
    drawn,
    dtypes,
    evaluate,
    fetched,
    make,
    name,
    place,
    ref,
    values,
)

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("distance, pool_mode", list(itertools.product(DISTANCES, ["avg", "max"])))
@pytest.mark.parametrize("sizes", ["equal", "shrinking", "student larger", "any"])
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_loss_matches_the_reference_for_every_switch(backend, dtype, sizes, distance, pool_mode):
    for pair_reduce in ("sum", "mean") if backend == "cpp" else random.sample(("sum", "mean"), 1):
        loss_matches(backend, drawn(backend, dtype), sizes, distance, pair_reduce, pool_mode)


def loss_matches(backend, dtype, sizes, distance, pair_reduce, pool_mode):
    dims, stages, n = random.randint(1, 3), random.randint(2, 3), random.randint(1, 3)
    channels = [random.choice((1, 3, 8, 17)) for _ in range(stages)]
    high = 11 if dims < 3 else 5
    first = size(dims, 2, high)
    student_sizes = [
        first if sizes == "equal" else [max(1, -(-s // 2**i)) for s in first] for i in range(stages)
    ]
    if sizes == "any":
        student_sizes = [size(dims, 1, high) for _ in range(stages)]
    teacher_sizes = (
        student_sizes if sizes in ("equal", "shrinking") else [size(dims, 1, high) for _ in range(stages)]
    )
    if sizes == "student larger":
        student_sizes = [[s + random.randint(0, 3) for s in t] for t in teacher_sizes]
    student, teacher = (
        [make((n, c, *s), dtype, random.choice(LAYOUTS)) for c, s in zip(channels, side)]
        for side in (student_sizes, teacher_sizes)
    )
    weights = random.choice((None, [random.uniform(-2, 2) for _ in range(stages - 1)]))
    switches = dict(
        pool_mode=pool_mode,
        distance=distance,
        pair_reduce=pair_reduce,
        weights=weights,
        weight=random.choice((1.0, 0.25, 100.0)),
    )
    check_loss(
        backend, "fsp_loss", student, teacher, upstream=torch.tensor(random.uniform(-3, 3)), **switches
    )


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_loss_matches_the_reference_for_many_channels(backend, dtype, distance):
    """Several blocks of rows and of columns."""
    dtype, shapes = drawn(backend, dtype), [(1, 70, 3, 5), (1, 130, 3, 5), (1, 67, 2, 2)]
    check_loss(
        backend,
        "fsp_loss",
        [make(s, dtype) for s in shapes],
        [make(s, dtype) for s in shapes],
        distance=distance,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_loss_matches_the_reference_for_mixed_dtypes_and_layouts(backend, dtype, layout):
    shapes = [(2, 16, 7, 7), (2, 5, 7, 7), (2, 33, 4, 3)]
    for other in dtypes(backend) if backend == "cpp" else (drawn(backend, None),):
        student, teacher = (
            [make(s, dtype, layout) for s in shapes],
            [make(s, other, random.choice(LAYOUTS)) for s in shapes],
        )
        check_loss(backend, "fsp_loss", student, teacher, distance=random.choice(DISTANCES))


@pytest.mark.parametrize(
    "student_needs",
    list(itertools.product([False, True], repeat=3)),
    ids=lambda needs: "".join("01"[n] for n in needs),
)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_gradient_can_be_asked_for_alone(backend, student_needs):
    others = list(itertools.product([False, True], repeat=3))
    for teacher_needs in others if backend == "cpp" else random.sample(others, 2):
        teacher_size = random.choice(((6, 6), (5, 4)))
        channels, student_sizes = (3, 5, 4), ((6, 6), (6, 6), (3, 3))
        student = [make((2, c, *s)) for c, s in zip(channels, student_sizes)]
        teacher = [
            make((2, c, *(s if teacher_size == (6, 6) else teacher_size)))
            for c, s in zip(channels, student_sizes)
        ]
        check_loss(backend, "fsp_loss", student, teacher, needs=student_needs + teacher_needs)


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)], ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_close_features_keep_their_relative_accuracy(backend, dtype, allowed):
    """Features 1e-2 apart: the difference of the products, not of rounded matrices."""
    t = [values((2, c, s, s), torch.float32).relu() for c, s in ((16, 32), (32, 16), (64, 8))]
    s = [(x + 1e-2 * torch.randn_like(x)).to(dtype) for x in t]
    t = [x.to(dtype) for x in t]
    with fastkd.use_backend(backend):
        ours = fetched(
            evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), [place(x, backend) for x in (*s, *t)])
        )
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:]), [x.double() for x in (*s, *t)])
    assert abs(ours.output.double() / exact.output - 1) < 1e-5
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < allowed


@pytest.mark.parametrize("backend", KERNELS)
def test_student_equal_to_teacher_has_loss_and_gradient_zero(backend):
    layouts = [random.choice(LAYOUTS) for _ in range(3)]
    x = [make((3, c, 7, 7), drawn(backend, None), layout) for c, layout in zip((8, 4, 16), layouts)]
    # in the same layouts: a sum in another order may round otherwise
    x, same = (
        [place(y, backend) for y in side]
        for side in (x, [arrange(y, layout) for y, layout in zip(x, layouts)])
    )
    for distance in DISTANCES:
        with fastkd.use_backend(backend), fused_only(backend=backend):
            got = evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:], distance=distance), [*x, *same])
        assert got.output == 0 and all((g == 0).all() for g in got.grads)
