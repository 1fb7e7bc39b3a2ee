"""FSP of stages of several sizes in the CUDA library: windows, read where a feature is or pooled before."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import check_loss, evaluate, fetched, make, ref

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_windows_are_those_of_pytorch(cuda, pool_mode):
    """Every size up to 20 pooled to every smaller one, read by way of the identity."""
    pool = {"avg": torch.nn.functional.adaptive_avg_pool1d, "max": torch.nn.functional.adaptive_max_pool1d}[
        pool_mode
    ]
    for size, grid in itertools.combinations(range(1, 21), 2):
        feature, identity = make((1, 2, grid), torch.float64), torch.eye(size, dtype=torch.float64)[None]
        got = fastkd.fsp_matrix(cuda(feature), cuda(identity), pool_mode=pool_mode).cpu() * size
        torch.testing.assert_close(got, pool(feature, size), rtol=1e-14, atol=1e-15)


def check_matrix(x, y, pool_mode):
    args = dict(pool_mode=pool_mode)
    ours = fetched(evaluate(lambda *x: fastkd.fsp_matrix(*x, **args), [x, y]))
    exact = evaluate(lambda *x: ref.fsp_matrix(*x, **args), [x.double(), y.double()])
    near = {torch.float64: 1e-13, torch.float32: 1e-5}
    for got, want, allowed in zip(
        (ours.output, *ours.grads), (exact.output, *exact.grads), (1e-5, 1e-2, 1e-2)
    ):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < near.get(x.dtype, allowed), error


CONSTANT = [(2,), (2, 1), (2, 2), (1, 2, 2), (4,), (2, 4), (2, 2, 2), (4, 4), (4, 2, 2)]
OTHER = [(3, 3), (2, 3, 2), (4, 8)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [*CONSTANT, *OTHER], ids=str)
def test_features_of_sizes_that_divide(cuda_launches, window, dtype, pool_mode, layout):
    """Windows of 2, 4, 8 or 16 numbers, which kernels have as constants, and others; read as a tile is made,
    or beforehand for many channels. Packs of channels where there are 16. Half of the numbers are 0: of equal
    maxima the first counts.
    """
    size = (2, 3, 5)[-len(window) :]
    fine = tuple(n * times for n, times in zip(size, window))
    for channels in (9, 16, 130):
        x, y = make((1, 16, *fine), dtype, layout, "relu"), make((1, channels, *size), dtype, layout)
        check_matrix(x, y, pool_mode)
        assert cuda_launches().count("fsp_pool") == (2 if channels == 130 else 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("pool_mode", ["avg", "max"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_that_are_pooled_before(cuda_launches, dtype, pool_mode, layout):
    s, t = (
        [make((2, c, *size), dtype, layout) for c, size in ((8, (7, 6)), (130, (3, 5)), (12, (6, 5)))]
        for _ in range(2)
    )
    check_loss("cuda", "fsp_loss", s, t, pool_mode=pool_mode, needs=[True] * 3 + [False] * 3)
    names = cuda_launches()
    assert names[:2] == ["fsp_pool", "fsp_forward"] and "fsp_pool" in names[2:]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "size, grid, precision",
    [
        ((36, 35), (5, 7), "tf32x3"),
        ((24, 24), (12, 12), "ieee"),
        ((12, 48), (12, 12), "ieee"),
        ((36, 30), (12, 10), "tf32x3"),
    ],
)
def test_gradients_of_averages_that_are_made_before(cuda_launches, size, grid, precision, dtype, layout):
    """Too many products to make at each position: coarse gradients that windows, which may overlap, are
    gathered from.
    """
    a, b = (
        make((1, 512, *size), dtype, layout).requires_grad_(),
        make((1, 512, *grid), torch.float32 if precision == "ieee" else dtype),
    )
    upstream = torch.randn(1, 512, 512)
    (got,) = torch.autograd.grad(fastkd.fsp_matrix(a, b, precision=precision), a, upstream)
    assert cuda_launches()[-2:] == ["fsp_backward", "fsp_backward"]
    x = a.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(ref.fsp_matrix(x, b.double()), x, upstream.double())
    assert (got.double() - want).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * want.abs().max()
