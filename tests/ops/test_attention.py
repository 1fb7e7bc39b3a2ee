"""attention_map and attention_transfer_loss: C++ and Triton kernels against the reference in float64, over
every switch.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attention_cases import POWERS, SHAPES, kind
from recorder import fused_only
from support import (
    DENSE,
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    arrange,
    check_loss,
    drawn,
    dtypes,
    evaluate,
    make,
    name,
    place,
    ref,
    some_shape,
    values,
)

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "p, signed, channel_reduce, eps_mode",
    list(itertools.product(POWERS, [False, True], ["mean", "sum"], ["clamp", "add"])),
)
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_loss_matches_the_reference_for_every_power(backend, dtype, p, signed, channel_reduce, eps_mode):
    dtype = drawn(backend, dtype)
    stages, n = random.randint(1, 3), random.choice((1, 2, 3, 5))
    student = [make(some_shape(n), dtype, random.choice(LAYOUTS), kind(p, signed)) for _ in range(stages)]
    teacher = [
        make(
            (s.shape[0], random.choice((1, 4, 19)), *s.shape[2:]),
            dtype,
            random.choice(DENSE),
            kind(p, signed),
        )
        for s in student
    ]
    # the gradient of a zero map is divided by eps, and has to fit
    eps = random.choice((1e-6, 0.5) if dtype == torch.float16 else (1e-12, 1e-6, 0.5))
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        teacher,
        p=p,
        signed=signed,
        channel_reduce=channel_reduce,
        eps=eps,
        eps_mode=eps_mode,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_loss_matches_the_reference_for_mixed_dtypes_and_layouts(backend, dtype, layout):
    for other in dtypes(backend) if backend == "cpp" else (drawn(backend, None),):
        mixed_loss_matches(backend, (dtype, other), layout)


def mixed_loss_matches(backend, pair, layout):
    student, teacher = [], []
    for shape in random.sample(SHAPES, 3 if backend == "cpp" else 2):
        shape = (3, *shape[1:])
        student.append(make(shape, pair[0], layout))
        # not expanded: two constant maps are equal, and their difference is rounding
        teacher.append(
            make(
                (shape[0], random.choice((1, 6, 33)), *shape[2:]),
                pair[1],
                random.choice((*DENSE, "sliced", "stepped")),
            )
        )
    check_loss(backend, "attention_transfer_loss", student, teacher)


def pooled_sizes(dims: int, larger: str) -> tuple[list[int], list[int]]:
    big, small = (
        [random.randint(4, 11) for _ in range(dims)],
        [random.randint(1, 4) for _ in range(dims - 1)] + [random.randint(3, 4)],
    )
    if larger == "each" and dims > 1:
        big[-1], small[-1] = small[-1], big[-1]
    return (small, big) if larger == "teacher" else (big, small)


@pytest.mark.parametrize(
    "pool, pool_mode, difference",
    list(itertools.product(["before", "after"], ["avg", "max"], ["squared", "l2"])),
)
@pytest.mark.parametrize("larger", ["student", "teacher", "each"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend", KERNELS)
def test_loss_matches_the_reference_when_sizes_differ(backend, dims, larger, pool, pool_mode, difference):
    dtype = random.choice(dtypes(backend))
    s_size, t_size = pooled_sizes(dims, larger)
    n, p = random.randint(1, 3), random.choice((1, 2, 3, 2.7))
    # of equal positions, which is the largest is a matter of pow's last bit, in the float64 reference too
    layouts = [layout for layout in LAYOUTS if not (pool_mode == "max" and layout == "expanded_space")]
    student = [
        make((n, 5, *s_size), dtype, random.choice(layouts)),
        make((n, 3, *t_size), dtype, random.choice(layouts)),
    ]
    teacher = [make((n, 4, *t_size), dtype, random.choice(DENSE)), make((n, 2, *t_size), dtype)]
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        teacher,
        p=p,
        pool=pool,
        pool_mode=pool_mode,
        difference=difference,
    )


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("pool", ["before", "after"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_pooling_of_signed_powers_matches_the_reference(backend, layout, pool, pool_mode):
    student, teacher = (
        make((2, 6, 9, 7), torch.float32, layout, "positive"),
        make((2, 3, 4, 7), torch.float32, kind="positive"),
    )
    check_loss(
        backend,
        "attention_transfer_loss",
        [student],
        [teacher],
        p=2.7,
        signed=True,
        pool=pool,
        pool_mode=pool_mode,
        eps_mode="add",
        eps=0.1,
    )


@pytest.mark.parametrize(
    "weights, weight", [(None, 1.0), ([0.5, 0.0, 3.0], 1.0), ([1, -2, 0.25], 1000.0), (None, 0.0)], ids=name
)
@pytest.mark.parametrize(
    "difference, stage_reduce", list(itertools.product(["squared", "l2"], ["sum", "mean"]))
)
@pytest.mark.parametrize("backend, dtype", [p for p in KERNEL_SAMPLES if p.values[1] != torch.float16])
def test_weights_and_reductions_match_the_reference(
    backend, dtype, difference, stage_reduce, weights, weight
):
    dtype = drawn(backend, dtype)
    student = [make((3, c, size, size), dtype) for c, size in ((4, 9), (8, 5), (16, 3))]
    teacher = [make(s.shape, dtype) for s in student]
    switches = dict(difference=difference, stage_reduce=stage_reduce, weights=weights, weight=weight)
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        teacher,
        upstream=torch.tensor(random.uniform(-3, 3)),
        **switches,
    )


@pytest.mark.parametrize("upstream", [1.0, 3.0])  # prepared in the forward pass, or not
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_large_gradients_match_the_reference(backend, dtype, layout, upstream):
    """In C++ gradients of a mebibyte and more are written past the caches, where their lines allow it; the
    last stage's do not.

    On a GPU several blocks of positions and parts of channels make up a map, and small tensors have them too.
    """
    slow = backend == "triton" or (backend == "cuda" and not torch.cuda.is_available())
    n, shapes = (
        (1, ((72, 33, 33), (130, 16, 16), (40, 24, 49)))
        if slow
        else (4, ((32, 72, 64), (16, 132, 128), (40, 57, 59)))
    )
    student, teacher = ([make((n, *shape), dtype, layout, "relu") for shape in shapes] for _ in range(2))
    needs = [True] * 3 + [False] * 3
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        teacher,
        needs=needs,
        upstream=torch.tensor(upstream),
        weight=100.0,
    )


@pytest.mark.parametrize("channels", [4, 8, 16, 32, 33, 48])
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (8, 8), (5, 19), (33, 2), (64, 65)], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_every_way_through_a_feature_matches_the_reference(backend, layout, size, channels):
    """Whole vectors, pairs of them (bfloat16), two positions in one, and what is left, of channels and of
    positions.
    """
    size = (16, 17) if backend != "cpp" and size == (64, 65) else size
    for dtype in (torch.bfloat16, torch.float32) if backend == "cpp" else (random.choice(dtypes(backend)),):
        student, teacher = (
            make((2, channels, *size), dtype, layout),
            make((2, channels, *size), dtype, layout),
        )
        check_loss(
            backend,
            "attention_transfer_loss",
            [student],
            [teacher],
            upstream=torch.tensor(random.choice((1.0, -7.0))),
        )


@pytest.mark.parametrize("teacher_size, pool", [((6, 5), "before"), ((3, 5), "before"), ((2, 2), "after")])
@pytest.mark.parametrize("difference", ["squared", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_precomputed_teacher_maps_match_the_reference(backend, layout, difference, teacher_size, pool):
    student = make((3, 4, 6, 5), random.choice(dtypes(backend)), layout)
    teacher = (
        ref.attention_map(values((3, 9, *teacher_size), torch.float64))
        .to(random.choice(dtypes(backend)))
        .contiguous()
    )
    if random.random() < 0.5:
        teacher = teacher.transpose(1, 2).contiguous().transpose(1, 2)
    check_loss(
        backend,
        "attention_transfer_loss",
        [student],
        [teacher],
        teacher_is_map=True,
        difference=difference,
        pool=pool,
    )


@pytest.mark.parametrize("pool", ["before", "after"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_gradient_can_be_asked_for_alone(backend, needs, pool):
    student, teacher = [make((2, 3, 7, 7)), make((2, 5, 4, 4))], [make((2, 4, 7, 7)), make((2, 2, 6, 6))]
    check_loss(backend, "attention_transfer_loss", student, teacher, needs=needs, pool=pool)


@pytest.mark.parametrize("backend", KERNELS)
def test_stages_of_unequal_rank_and_dtype_go_through_one_call(backend):
    student = [make((2, 3, 7)), make((2, 2, 3, 3), torch.float16), make((2, 7, 2, 3, 4), torch.bfloat16)]
    teacher = [make(s.shape, torch.float32) for s in student]
    with fastkd.use_backend(backend), fused_only(backend=backend) as calls:
        evaluate(
            lambda *x: fastkd.attention_transfer_loss(x[:3], x[3:]),
            [place(x, backend) for x in (*student, *teacher)],
        )
    assert calls.fused == ["attention_transfer_loss", "attention_transfer_loss_backward"]
    check_loss(backend, "attention_transfer_loss", student, teacher)


@pytest.mark.parametrize("backend", KERNELS)
def test_close_maps_keep_their_relative_accuracy(backend):
    t = [values((8, 16, size, size), torch.float32) for size in (32, 16, 8)]
    s = [x * (1 + 1e-3 * torch.randn_like(x)) for x in t]
    with fastkd.use_backend(backend):
        ours = (
            fastkd.attention_transfer_loss([place(x, backend) for x in s], [place(x, backend) for x in t])
            .double()
            .cpu()
        )
    exact = ref.attention_transfer_loss([x.double() for x in s], [x.double() for x in t])
    assert abs(ours / exact - 1) < 2e-3


@pytest.mark.parametrize("backend", KERNELS)
def test_student_equal_to_teacher_has_loss_and_gradient_zero(backend):
    layout = random.choice(LAYOUTS)
    x = make((3, 8, 7, 7), random.choice(dtypes(backend)), layout)
    same = arrange(x, layout)  # in the same layout: a sum in another order may round otherwise
    for difference in ("squared", "l2"):
        tensors = [place(x, backend), place(same, backend)]
        with fastkd.use_backend(backend), fused_only(backend=backend):
            got = evaluate(lambda s, t: fastkd.attention_transfer_loss(s, t, difference=difference), tensors)
        assert got.output == 0 and all((g == 0).all() for g in got.grads)
