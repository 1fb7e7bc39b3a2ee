"""fsp_matrix: C++ and Triton kernels against the reference in float64, and its gradients."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from fsp_cases import SUMS, matrix_check, size
from support import (
    HALF,
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    check,
    drawn,
    dtypes,
    make,
    name,
    ref,
    some_shape,
)

import fastkd

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
pytestmark = pytest.mark.usefixtures("one_thread")


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
