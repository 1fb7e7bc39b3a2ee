"""fsp_matrix and fsp_loss: C++ and Triton kernels against the reference in float64, over dtypes, layouts,
shapes and every switch.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from recorder import fused_only
from support import (
    DTYPES,
    HALF,
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    arrange,
    check,
    check_loss,
    drawn,
    dtypes,
    evaluate,
    fetched,
    make,
    name,
    place,
    ref,
    some_shape,
    values,
)

import fastkd
from fastkd import native
from fastkd.ops import fsp
from fastkd.ops._grad_prefetch import GradPrefetch

SHAPES = (
    (1, 1, 1),
    (2, 3, 7, 7),
    (3, 1, 5, 11),
    (1, 17, 13),
    (2, 64, 8, 8),
    (1, 33, 17, 15),
    (2, 5, 3, 4, 5),
    (3, 2, 1, 1),
    (2, 37, 1, 19),
    (1, 130, 4, 4),
)
SUMS = ("aten::add.Tensor",)  # autograd's own, where one tensor stands at two places
DISTANCES = ("squared", "frobenius", "column_l2")
pytestmark = pytest.mark.usefixtures("one_thread")


def matrix_check(backend, a, b, *, upstream=None, needs=None, **switches):
    if upstream is None:
        upstream = torch.randn(a.shape[0], a.shape[1], b.shape[1])
    ours, exact = (lambda a, b, f=f: f(a, b, **switches) for f in (fastkd.fsp_matrix, ref.fsp_matrix))
    terms = ref.fsp_matrix(a.abs().double(), b.abs().double(), **switches).max().item()
    return check(backend, ours, exact, [a, b], needs, upstream, output_terms=terms)


def size(dims: int, low: int = 1, high: int = 11) -> list[int]:
    return [random.randint(low, high) for _ in range(dims)]


@pytest.fixture
def upstream_guess(monkeypatch):
    """A guess of the upstream gradient that no other test has touched; call it to set what is expected."""

    def expect(value: float | None) -> None:
        guess = GradPrefetch()  # of its own it expects 1
        if value != 1.0:
            guess.expect = lambda: ((0, 0.0), value)
        monkeypatch.setattr(fsp, "_prefetch", guess)

    expect(1.0)
    return expect


# the matrix


@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("backend", KERNELS)
def test_matrix_matches_the_reference_in_every_pair_of_layouts(backend, a_layout):
    for b_layout in LAYOUTS if backend == "cpp" else random.sample(LAYOUTS, 2):
        matrix_matches_in_layouts(backend, (a_layout, b_layout))


def matrix_matches_in_layouts(backend, layouts):
    shape = some_shape()
    b_shape = (shape[0], random.choice((1, 4, 9, 40)), *shape[2:])
    matrix_check(
        backend, *(make(s, drawn(backend, None), layout) for s, layout in zip((shape, b_shape), layouts))
    )


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_matrix_matches_the_reference_for_mixed_dtypes(backend, dtype, shape):
    b_shape = (shape[0], random.choice((1, 7, 16, 65)), *shape[2:])
    matrix_check(
        backend,
        make(shape, dtype, random.choice(LAYOUTS)),
        make(b_shape, random.choice(dtypes(backend)), random.choice(LAYOUTS)),
    )


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("larger", ["a", "b", "each"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_matrix_matches_the_reference_when_sizes_differ(backend, dtype, dims, larger, pool_mode):
    dtype = drawn(backend, dtype)
    sizes = [size(dims, 4), size(dims, 1, 4)]
    if larger == "each":
        sizes[0][-1], sizes[1][-1] = sizes[1][-1], sizes[0][-1]
    elif larger == "b":
        sizes.reverse()
    n = random.randint(1, 3)
    other = drawn(backend, None)
    a, b = (
        make((n, 5, *sizes[0]), dtype, random.choice(LAYOUTS)),
        make((n, 3, *sizes[1]), other, random.choice(LAYOUTS)),
    )
    matrix_check(backend, a, b, pool_mode=pool_mode)


@pytest.mark.parametrize("window", [(2, 2), (1, 2), (4, 1), (3, 1), (2, 4), (2, 2, 1)], ids=name)
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_matrix_matches_the_reference_for_windows_that_divide(backend, dtype, window):
    dtype, small = drawn(backend, dtype), size(len(window), 1, 5)
    large = [s * w for s, w in zip(small, window)]
    pair = [make((2, c, *s), dtype, random.choice(LAYOUTS)) for c, s in ((17, large), (5, small))]
    random.shuffle(pair)
    matrix_check(backend, *pair, pool_mode=random.choice(("avg", "avg", "max")))


@pytest.mark.parametrize("sizes", [((6, 6), (6, 6)), ((6, 6), (3, 2))], ids=name)
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "stepped", "diagonal"])
@pytest.mark.parametrize("backend", KERNELS)
def test_matrix_takes_incoming_gradients_of_any_strides(backend, upstream, sizes):
    grads = {
        "expanded": torch.randn(1, 1, 1).expand(2, 5, 7),
        "transposed": torch.randn(2, 7, 5).transpose(1, 2),
        "stepped": torch.randn(4, 5, 14)[::2, :, ::2],
        "diagonal": torch.randn(2, 1, 7).expand(2, 5, 7),
    }
    matrix_check(backend, make((2, 5, *sizes[0])), make((2, 7, *sizes[1])), upstream=grads[upstream])


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=name)
@pytest.mark.parametrize("b_size", [(5, 5), (3, 7)], ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_matrix_gives_only_the_gradients_asked_for(backend, b_size, needs):
    matrix_check(backend, make((2, 3, 5, 5)), make((2, 4, *b_size)), needs=needs)


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", None])
def test_precision_changes_nothing_on_a_cpu(cpp, precision):
    a, b = make((2, 16, 8, 8)), make((2, 32, 8, 8))
    with fastkd.use_backend("cpp"):
        assert torch.equal(fastkd.fsp_matrix(a, b, precision=precision), fastkd.fsp_matrix(a, b))
        assert torch.equal(
            fastkd.fsp_loss([a, b], [b[:, :16], b], precision=precision),
            fastkd.fsp_loss([a, b], [b[:, :16], b]),
        )


@pytest.mark.parametrize("backend", KERNELS)
def test_matrix_of_a_map_with_itself_has_the_whole_gradient(backend):
    for dtype, layout in itertools.product(dtypes(backend), LAYOUTS):
        x = make((2, 5, 4, 3), dtype, layout)
        upstream = torch.randn(2, 5, 5)
        check(
            backend,
            lambda x: fastkd.fsp_matrix(x, x),
            lambda x: ref.fsp_matrix(x, x),
            [x],
            upstream=upstream,
            k=3 if dtype in HALF else None,
            also=SUMS,
        )


# the loss


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


@pytest.fixture(params=[True, False], ids=["amx", "without amx"])
def amx(request, cpp):
    """AMX, where it is, and the way of other processors."""
    before = native.amx()
    if request.param and not before:
        pytest.skip("no AMX here")
    native.set_amx(request.param)
    yield request.param
    native.set_amx(before)


WIDE = {
    "equal": ((70, 9, 9), (33, 9, 9)),
    "even windows": ((64, 16, 16), (130, 8, 8), (48, 4, 4)),
    "odd lines": ((33, 14, 10), (96, 7, 5), (17, 7, 5)),
    "several blocks": ((96, 32, 64), (64, 32, 64), (40, 16, 32)),
    "many channels": ((320, 6, 6), (700, 3, 3)),
    "other windows": ((48, 9, 9), (40, 3, 3), (33, 7, 7)),
    "slices": ((40, 2, 6, 10), (24, 2, 3, 5)),
}


@pytest.mark.parametrize(
    "layouts", list(itertools.product(["contiguous", "channels_last"], repeat=2)), ids=name
)
@pytest.mark.parametrize("shapes", WIDE)
def test_wide_bfloat16_matches_the_reference(amx, shapes, layouts):
    """Whole and broken tiles, averages over 2 x 2 (also of lines shorter than a tile) and others; student and
    teacher in any layout.
    """
    student, teacher = (
        [make((2, *shape), torch.bfloat16, layout, "relu") for shape in WIDE[shapes]] for layout in layouts
    )
    check_loss(
        "cpp",
        "fsp_loss",
        student,
        teacher,
        distance=random.choice(DISTANCES),
        pool_mode=random.choice(("avg", "avg", "max")),
    )
    if shapes != "several blocks":
        matrix_check("cpp", student[0], teacher[1])
    pairs = [[x, x.clone()] for x in student]
    with fastkd.use_backend("cpp"):
        same = evaluate(lambda *x: fastkd.fsp_loss(x[0::2], x[1::2]), list(itertools.chain(*pairs)))
    assert same.output == 0 and all((g == 0).all() for g in same.grads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinite_gradient_of_wide_bfloat16_stays_infinite(amx, layout):
    """Split in two parts, it must not leave a NaN."""
    a, b = (make((1, 32, 6, 6), torch.bfloat16, layout, "positive") for _ in range(2))
    upstream = torch.ones(1, 32, 32)
    upstream[0, 3, 5] = math.inf
    with fastkd.use_backend("cpp"):
        grads = evaluate(fastkd.fsp_matrix, [a, b], upstream=upstream).grads
    for grad, channel in zip(grads, (3, 5)):
        assert (grad[:, channel] == math.inf).all()
        assert grad.isfinite().sum() == grad.numel() - grad[:, channel].numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_close_wide_features_keep_their_relative_accuracy(amx, layout):
    """As below, of maps wide enough for AMX: neither the split gradient nor the sums of both chains in one
    may cost digits.
    """
    t = [values((2, c, s, s), torch.float32, "relu") for c, s in ((32, 32), (64, 16), (128, 8))]
    s = [arrange((x + 1e-2 * torch.randn_like(x)).to(torch.bfloat16), layout) for x in t]
    t = [arrange(x.to(torch.bfloat16), layout) for x in t]
    with fastkd.use_backend("cpp"):
        ours = evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), [*s, *t])
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:]), [x.double() for x in (*s, *t)])
    assert abs(ours.output.double() / exact.output - 1) < 1e-6
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < 2e-3  # the rounding of the result alone is 1.7e-3


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


def chain(
    n: int = 3, dtype: torch.dtype = torch.float32, layout: str = "contiguous", count: int = 4
) -> list[torch.Tensor]:
    sizes = (6, 9, 9), (7, 9, 9), (5, 4, 4), (6, 4, 4)
    return [make((n, *shape), dtype, layout) for shape in sizes[:count]]


def test_all_pairs_go_through_one_call_in_each_direction(cpp, upstream_guess):
    student, teacher = chain(), chain()
    for value, calls in (
        (torch.tensor(1.0), ["fsp_loss"]),
        (torch.tensor(2.0), ["fsp_loss", "fsp_loss_backward"]),
    ):
        with fastkd.use_backend("cpp"), fused_only() as seen:
            evaluate(
                lambda *x: fastkd.fsp_loss(x[:4], x[4:]),
                [*student, *teacher],
                [True] * 4 + [False] * 4,
                value,
            )
        assert seen.fused == calls


@pytest.mark.parametrize(
    "needs", [(True,) * 8, (True,) * 4 + (False,) * 4, (False, True, False, True) + (False,) * 4], ids=name
)
@pytest.mark.parametrize("n", [3, 64], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_made_in_the_forward_are_those_of_the_backward_to_the_bit(
    cpp, dtype, layout, n, needs, upstream_guess
):
    tensors, value = [*chain(n, dtype, layout), *chain(n, dtype)], torch.tensor(0.75)
    pool_mode = random.choice(("avg", "max"))

    def gradients(expected: float | None) -> tuple[list, list]:
        upstream_guess(expected)
        with fastkd.use_backend("cpp"), fused_only() as seen:
            result = evaluate(
                lambda *x: fastkd.fsp_loss(x[:4], x[4:], pool_mode=pool_mode, weight=3.0),
                tensors,
                needs,
                value,
            )
        return [result.output, *(g for g in result.grads if g is not None)], seen.fused

    made, calls = gradients(0.75)
    assert calls == ["fsp_loss"] + (["fsp_loss_backward"] if needs[4] else [])
    for expected in (None, 1.0, -0.75):
        computed, calls = gradients(expected)
        assert calls == ["fsp_loss"] + ["fsp_loss_backward"] * (2 if needs[4] else 1)
        assert all(map(torch.equal, made, computed))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name)
def test_large_gradients_match_the_reference(cpp, dtype, layout):
    """Gradients of a mebibyte and more are written past the caches: of one term, of a pooled and a direct
    one, of two direct ones.
    """
    sizes = (16, 32, 32), (16, 32, 32), (17, 32, 32), (32, 16, 16)
    student, teacher = ([make((16, *shape), dtype, layout, "relu") for shape in sizes] for _ in range(2))
    check_loss("cpp", "fsp_loss", student, teacher, needs=[True] * 4 + [False] * 4)


@pytest.mark.parametrize("n", [3, 4, 17], ids=name)
def test_samples_and_passes_give_the_same_bits(cpp, n):
    """Three samples on two threads are done pass by pass, three on one thread or four on two sample by
    sample.
    """
    tensors = [*chain(n), *chain(n)]
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        with fastkd.use_backend("cpp"):
            result = evaluate(lambda *x: fastkd.fsp_loss(x[:4], x[4:]), tensors)
        results.append([result.output, *result.grads])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_a_second_backward_pass_gets_gradients_of_its_own(cpp, upstream_guess):
    student, teacher = [x.requires_grad_() for x in chain()], chain()
    with fastkd.use_backend("cpp"):
        loss = fastkd.fsp_loss(student, teacher)
        first = torch.autograd.grad(loss, student, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, student, retain_graph=True)
        assert all(map(torch.equal, second, kept))
        assert not {g.data_ptr() for g in first} & {g.data_ptr() for g in second}
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(student, kept))


def test_the_guess_follows_a_steady_upstream_gradient(cpp, upstream_guess):
    student, teacher = chain(), chain()
    calls = []
    for value in map(torch.tensor, (8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0)):
        with fastkd.use_backend("cpp"), fused_only() as seen:
            evaluate(lambda *x: fastkd.fsp_loss(x, teacher), student, upstream=value)
        calls.append(len(seen.fused))
    # after a change twice the same is asked for, since what followed a 1 before was an 8
    assert calls == [2, 2, 1, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("shape", [(4, 16, 16, 16), (4, 16, 8, 8)], ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_tensor_twice_has_the_whole_gradient(backend, shape):
    if backend == "triton" and not torch.cuda.is_available():  # interpreted, a product takes long
        shape = (1, 5, *shape[2:])
    x, y = make(shape), make((*shape[:2], 16, 16))
    for distance in DISTANCES:
        check(
            backend,
            *[
                lambda x, y, f=f: f([x, x], [y, y], distance=distance)
                for f in (fastkd.fsp_loss, ref.fsp_loss)
            ],
            [x, y],
            k=8,
            also=SUMS,
        )
        check(
            backend,
            *[
                lambda x, y, f=f: f([x, y, x], [y, x, y], distance=distance)
                for f in (fastkd.fsp_loss, ref.fsp_loss)
            ],
            [x, y],
            k=8,
            also=SUMS,
        )


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
