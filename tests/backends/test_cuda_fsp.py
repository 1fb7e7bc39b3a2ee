"""What is FSP's own in the CUDA library: precisions, launches, the order of threads."""

from __future__ import annotations

import itertools
import math
import random

import emulated
import pytest
import torch
from cuda_cases import CIFAR, PRECISIONS
from support import LAYOUTS, check_loss, evaluate, fetched, make, ref, values

import fastkd
from fastkd import native
from fastkd._bits import FSP
from fastkd.ops.fsp import apart

pytestmark = pytest.mark.usefixtures("one_thread")


# precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_precision_is_as_near_as_it_claims(cuda, dtype, precision):
    """For maps 1e-2 apart, which the difference form keeps apart; tensor cores cut off what is not rounded
    before.
    """
    t = [values((2, *shape), torch.float32).relu() for shape in CIFAR]
    s = [(x + 1e-2 * torch.randn_like(x)).to(dtype) for x in t]
    t = [x.to(dtype) for x in t]
    # the weight keeps gradients of float16 from vanishing
    given = [cuda(x) for x in (*s, *t)]
    ours = fetched(evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:], weight=1e4, precision=precision), given))
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:], weight=1e4), [x.double() for x in (*s, *t)])
    rounded = dtype != torch.bfloat16 and precision == "tf32"
    error = abs(ours.output.double() / exact.output - 1)
    assert error < (5e-4 if rounded else 1e-5), error
    allowed = {torch.float32: 2e-3 if rounded else 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < allowed


@pytest.mark.parametrize("channels", [(16, 8), (64, 64)])
@pytest.mark.parametrize("size", [32, 64])
def test_tf32_rounds_to_nearest_and_the_others_do_not(cuda, size, channels):
    """Positive numbers, whose errors would add up were they cut off, as tensor cores do with sums."""
    a, b = (make((1, c, size, size), kind="relu") for c in channels)
    exact = ref.fsp_matrix(a.double(), b.double())
    errors = [
        (fastkd.fsp_matrix(cuda(a), cuda(b), precision=p).double().cpu() / exact - 1).abs().max().item()
        for p in PRECISIONS
    ]
    assert errors[0] < 3e-6 and 5e-6 < errors[1] < 1.5e-4 and errors[2] < 3e-6, errors


def test_tf32_rounds_ties_to_even(cuda):
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("before sm_90 ties are rounded away from zero")
    place, one = 2.0**-10, torch.ones(1, 1, 1)
    for sign, (more, rounded) in itertools.product((1, -1), ((0.5, 0), (1.5, 2), (0.51, 1))):
        x, nearest = sign * (1 + more * place), sign * (1 + rounded * place)
        assert fastkd.fsp_matrix(cuda(one * x), cuda(one), precision="tf32").item() == nearest


def test_sums_of_bfloat16_are_as_near_as_those_of_float32(cuda):
    a, b = (make((1, c, 64, 64), torch.bfloat16, kind="relu") for c in (16, 64))
    exact = ref.fsp_matrix(a.double(), b.double())
    error = (fastkd.fsp_matrix(cuda(a), cuda(b)).double().cpu() / exact - 1).abs().max().item()
    assert error < 3e-6, error


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_infinity_stays_and_nan_is_not_lost(cuda, dtype, precision, pool_mode):
    """Three products may make NaN of an infinity, whose products with the two parts of a number have two
    signs.
    """
    a, b = make((2, 3, 4, 4), dtype, kind="relu"), make((2, 5, 2, 2), dtype)
    a[0, 1, 2, 3], a[1, 0, 0, 0], a[1, 2, 1, 1] = torch.inf, torch.nan, torch.nan
    want = ref.fsp_matrix(a, b, pool_mode=pool_mode)
    got = fastkd.fsp_matrix(cuda(a), cuda(b), pool_mode=pool_mode, precision=precision).cpu()
    assert torch.equal(got.isfinite(), want.isfinite()) and got[want.isnan()].isnan().all()
    parts = {"ieee": [torch.float16], "tf32": [], "tf32x3": [torch.float16, torch.float32]}[precision]
    assert dtype in parts or torch.equal(got.isinf(), want.isinf())


# launches


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_chain_takes_one_launch_each_way(cuda_launches, layout):
    s, t = ([make((2, *shape), torch.float32, layout) for shape in CIFAR] for _ in range(2))
    for x in s:
        x.requires_grad_()
    fastkd.fsp_loss(s, t).backward()
    assert cuda_launches() == ["fsp_forward", "fsp_backward"]
    torch.autograd.grad(fastkd.fsp_matrix(s[0], s[1]).sum(), s[:2])
    assert cuda_launches() == ["fsp_forward", "fsp_backward"]
    fastkd.fsp_loss([s[0], s[0]], [t[0], t[0]], pool_mode="max").backward()
    assert cuda_launches() == ["fsp_forward", "fsp_backward"]


def test_maxima_and_wide_neighbours_take_launches_of_their_own(cuda_launches):
    s = [make((1, c, n, n)).requires_grad_() for c, n in ((3, 9), (4, 4), (5, 2))]
    t = [make((1, c, n, n)) for c, n in ((3, 8), (4, 4), (5, 2))]
    fastkd.fsp_loss(s, t, pool_mode="max").backward()
    assert cuda_launches() == ["fsp_forward", "fsp_backward", "fsp_backward"]
    a, b = make((1, 3, 6, 6)).requires_grad_(), make((1, 129, 3, 3)).requires_grad_()
    fastkd.fsp_matrix(a, b).sum().backward()
    assert cuda_launches() == ["fsp_pool", "fsp_forward", "fsp_pool", "fsp_backward"]


def test_long_chains_take_several_launches(cuda_launches):
    """As many stages as are served: eight pairs a launch, five gradients."""
    s, t = ([make((2, 3 + i % 4, 5, 4 + i % 2)) for i in range(16)] for _ in range(2))
    for distance in ("squared", "column_l2"):
        check_loss("cuda", "fsp_loss", s, t, needs=[True] * 16 + [False] * 16, distance=distance)
        assert cuda_launches() == ["fsp_forward"] * 2 + ["fsp_backward"] * 4


@pytest.mark.parametrize("a, b", [(16, 16), (9, 24), (32, 64), (64, 64), (72, 130)])
@pytest.mark.parametrize("precision, each", [("tf32", 2), ("tf32x3", 6), ("bfloat16", 1)])
def test_no_product_is_made_twice(cuda_launches, precision, each, a, b):
    """Also where a tile has fewer parts than a block has warps."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, y = make((2, a, 7, 8), dtype).requires_grad_(), make((2, b, 7, 8), dtype)

    def count(rows, columns, terms):
        return 2 * math.ceil(rows / 16) * math.ceil(columns / 8) * math.ceil(terms / 16) * each

    emulated.products()
    matrix = fastkd.fsp_matrix(x, y, precision="ieee" if dtype == torch.bfloat16 else precision)
    assert emulated.products() == count(a, b, 56)
    torch.autograd.grad(matrix.sum(), x)
    # the matrix's gradient is float32, which takes two parts of bfloat16
    assert emulated.products() == count(a, 56, b) * (2 if dtype == torch.bfloat16 else 1)


# bits


@pytest.mark.skipif(not native.EMULATED, reason="a GPU has an order of its own")
@pytest.mark.parametrize("distance", ["squared", "column_l2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_do_not_depend_on_the_order_of_threads(cuda, dtype, distance):
    """Several tiles of rows and columns, warps that share a tile, pooling of every kind, student and teacher
    of other sizes.
    """
    shapes = [(70, 9, 9), (66, 5, 4), (17, 4, 4), (5, 8, 8), (131, 4, 4)]
    layouts = random.choices(LAYOUTS, k=10)
    s = [make((2, *shape), dtype, layout).requires_grad_() for shape, layout in zip(shapes, layouts)]
    t = [
        make((2, shape[0], *(size + i % 2 for i, size in enumerate(shape[1:]))), dtype, y)
        for shape, y in zip(shapes, layouts[5:])
    ]
    switches = dict(
        distance=distance, pool_mode=random.choice(("avg", "max")), precision=random.choice(PRECISIONS)
    )

    def bits():
        loss, matrix = fastkd.fsp_loss(s, t, **switches), fastkd.fsp_matrix(s[0], s[1], precision="tf32")
        return [
            loss,
            *torch.autograd.grad(loss, s),
            matrix,
            *torch.autograd.grad(matrix.square().sum(), s[:2]),
        ]

    first = bits()
    try:
        emulated.backwards(True)
        assert all(torch.equal(a, b) for a, b in zip(first, bits()))
    finally:
        emulated.backwards(False)


@pytest.mark.skipif(not native.EMULATED, reason="two backends on one device")
@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_what_is_saved_means_the_same_to_both_libraries(cuda, cpp, distance, pool_mode):
    s, t = ([make((2, *shape), torch.float64) for shape in CIFAR] for _ in range(2))
    options = FSP.pack(
        pool_mode=pool_mode,
        distance=distance,
        pair_reduce="mean",
        precision="ieee",
        with_grad=True,
        prepare=True,
    )
    args = (s, t, options, [-2.5, 3.0, 1.0, -2.0])
    ours, (loss, joined, prepared) = torch.ops.fastkd_cuda.fsp_loss(*args), torch.ops.fastkd.fsp_loss(*args)
    theirs = loss, apart(joined, s), prepared
    grad = torch.tensor(-2.5, dtype=torch.float64)
    for library in (torch.ops.fastkd_cuda, torch.ops.fastkd):
        for _, matrices, gradients in (ours, theirs):
            computed = library.fsp_loss_backward(grad, s, matrices, options, [0, 2], [])
            for a, b in zip(computed, gradients[::2], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-11, atol=1e-13)
