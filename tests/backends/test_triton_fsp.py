"""What is FSP's own in Triton: precisions, pooling fused and before, launches, offsets; on a GPU, graphs and
large tensors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_graphs import check_captured
from support import evaluate, fetched, gpu, make, missing, ref, values

import fastkd
from fastkd import kernels
from fastkd._bits import FSP

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
gradient = pytest.importorskip("fastkd.kernels.fsp.gradient")
CIFAR = ((16, 16, 16), (32, 8, 8), (9, 4, 4))
PRECISIONS = ("ieee", "tf32", "tf32x3")


def close_chains(dtype, n=2, distance=1e-2):
    t = [values((n, *shape), torch.float32).relu() for shape in CIFAR]
    s = [x + distance * torch.randn_like(x) for x in t]
    return [x.to(dtype) for x in s], [x.to(dtype) for x in t]


# precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_precision_is_as_near_as_it_claims(triton, dtype, precision):
    """For maps 1e-2 apart. The interpreter rounds to tf32 as a GPU does, its products are float32's."""
    s, t = close_chains(dtype)
    given = [triton(x) for x in (*s, *t)]
    # the weight keeps gradients of float16 from vanishing
    ours = fetched(evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:], weight=1e4, precision=precision), given))
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:], weight=1e4), [x.double() for x in (*s, *t)])
    rounded = dtype != torch.bfloat16 and precision == "tf32"
    error = abs(ours.output.double() / exact.output - 1)
    assert error < (5e-4 if rounded else 1e-5), error
    allowed = {torch.float32: 2e-3 if rounded else 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < allowed


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_a_stage_between_two_grids_has_narrow_tiles_and_right_gradients(triton, monkeypatch, precision):
    """Four warps hold no two sums of 64 x 64 and two stages of loads."""
    cuts, narrowed = [], gradient.narrowed
    monkeypatch.setattr(gradient, "narrowed", lambda *given: (cuts.append(narrowed(*given)), cuts[-1])[1])
    sizes = ((8, 32), (70, 16), (8, 8))
    s, t = ([make((1, c, n, n)) for c, n in sizes] for _ in range(2))
    given = [triton(x) for x in (*s, *t)]
    ours = fetched(evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:], precision=precision), given))
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:]), [x.double() for x in (*s, *t)])
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < 1e-6
    assert (64, 32) in [cut[:2] for cut in cuts]


def test_tf32_rounds_and_the_others_do_not(triton):
    a, b = triton(make((2, 16, 8, 8))), triton(make((2, 8, 8, 8)))
    exact = ref.fsp_matrix(a.double().cpu(), b.double().cpu())
    errors = [
        (fastkd.fsp_matrix(a, b, precision=p).double().cpu() - exact).abs().max().item() for p in PRECISIONS
    ]
    assert errors[0] < 1e-6 and 1e-5 < errors[1] < 1e-3 and errors[2] < 2e-6


def test_tf32_rounds_ties_to_even(triton):
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("before sm_90 ties are rounded away from zero")
    place, one = 2.0**-10, torch.ones(1, 1, 1)
    for sign, (more, rounded) in itertools.product((1, -1), ((0.5, 0), (1.5, 2), (0.51, 1))):
        x, nearest = sign * (1 + more * place), sign * (1 + rounded * place)
        assert fastkd.fsp_matrix(triton(one * x), triton(one), precision="tf32").item() == nearest


def test_no_precision_is_that_of_pytorch(triton):
    a, b = triton(make((2, 16, 8, 8))), triton(make((2, 8, 8, 8)))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert torch.equal(fastkd.fsp_matrix(a, b), fastkd.fsp_matrix(a, b, precision=setting))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_infinity_stays_and_nan_is_not_lost(triton):
    a, b = make((2, 3, 4, 4), torch.bfloat16, kind="relu"), make((2, 5, 2, 2), torch.bfloat16)
    a[0, 1, 2, 3], a[1, 0, 0, 0] = torch.inf, torch.nan
    got, want = fastkd.fsp_matrix(triton(a), triton(b)).cpu(), ref.fsp_matrix(a, b)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


# launches and bits


@pytest.mark.parametrize("distance", ["squared", "column_l2"])
def test_results_are_the_same_bits_in_each_run(triton, distance):
    s, t = (
        [triton(make((3, c, n, n), kind="relu")).requires_grad_() for c, n in ((5, 9), (70, 6), (17, 6))]
        for _ in range(2)
    )

    def bits():
        loss, g = fastkd.fsp_loss(s, t, distance=distance), fastkd.fsp_matrix(s[1], s[2])
        return [loss, *torch.autograd.grad(loss, s + t), g, *torch.autograd.grad(g.square().sum(), s[1:])]

    first = bits()
    assert all(torch.equal(a, b) for a, b in zip(first, bits()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_chain_takes_one_launch_each_way_with_common_pooling(triton, launched, layout):
    s = [triton(make((2, *shape), torch.float32, layout)).requires_grad_() for shape in CIFAR]
    t = [triton(make((2, *shape), torch.float32, layout)) for shape in CIFAR]
    fastkd.fsp_loss(s, t).backward()
    assert launched == ["fsp_loss_kernel", "fsp_gradient_kernel"]
    launched.clear()
    torch.autograd.grad(fastkd.fsp_matrix(s[0], s[1]).sum(), s[:2])
    assert launched == ["fsp_matrix_kernel", "fsp_gradient_kernel"]


def test_unusual_pooling_takes_launches_of_its_own(triton, launched):
    s = [triton(make((1, c, n, n))).requires_grad_() for c, n in ((3, 9), (4, 4), (5, 2))]
    t = [triton(make((1, c, n, n))) for c, n in ((3, 8), (4, 4), (5, 2))]
    fastkd.fsp_loss(s, t).backward()
    assert launched == ["_pool", "fsp_loss_kernel", "_pool", "fsp_gradient_kernel", "_spread"]
    launched.clear()
    fastkd.fsp_loss(s[1:], t[1:], pool_mode="max").backward()
    assert launched == ["_pool", "_pool", "fsp_loss_kernel", "_pool", "fsp_gradient_kernel", "_spread"]


def test_offsets_within_a_large_sample_are_as_wide(triton, monkeypatch):
    """The kernel for samples beyond 2^31 elements gives the same bits."""
    from fastkd.kernels.fsp import forward, gradient, view

    tensors = [
        make((2, *shape), torch.float32, layout) for shape in CIFAR for layout in ("contiguous", "stepped")
    ]
    tensors = [triton(x) for x in tensors]
    results = []
    for far in (2**31, 0):
        monkeypatch.setattr(view, "FAR", far)
        for plans in (forward._plans, gradient._plans):
            plans.clear()
        result = evaluate(lambda *x: fastkd.fsp_loss(x[::2], x[1::2]), tensors)
        results.append([result.output, *result.grads])
    for plans in (forward._plans, gradient._plans):
        plans.clear()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("pool_mode", ["avg", "max"])
def test_the_operator_gives_what_its_schema_says(triton, pool_mode):
    """The launchers as operators: for graphs, and for whoever calls them directly; with gradients for an
    upstream that is foreseen.
    """
    from fastkd.ops._fsp_operators import _loss_fake

    s, t = ([triton(make((2, *shape))) for shape in CIFAR] for _ in range(2))
    options = FSP.pack(
        pool_mode=pool_mode,
        distance="frobenius",
        pair_reduce="mean",
        precision="ieee",
        with_grad=True,
        prepare=True,
    )
    args = (s, t, options, [-2.5, 3.0, 1.0, -2.0])
    got, fake = kernels.launcher("fsp_loss")(*args), _loss_fake(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    leaves = [x.clone().requires_grad_() for x in s]
    loss = fastkd.fsp_loss(
        leaves,
        t,
        pool_mode=pool_mode,
        distance="frobenius",
        pair_reduce="mean",
        weights=[1.0, -2.0],
        weight=3.0,
    )
    want = torch.autograd.grad(loss * -2.5, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got[2], want, strict=True))


# on a GPU


def on_gpu(requires_grad=False):
    return [
        torch.randn(4, c, n, n, device="cuda", requires_grad=requires_grad)
        for c, n in ((16, 32), (64, 16), (130, 7), (200, 7))
    ]


def exact_gradients(s, t):
    """By float64 on the CPU: the reference's pooling has no deterministic backward pass on a GPU, and the
    tests run in that mode.
    """
    s, t = [x.detach().cpu().double().requires_grad_() for x in s], [x.detach().cpu().double() for x in t]
    return tuple(x.float().cuda() for x in torch.autograd.grad(ref.fsp_loss(s, t), s))


@gpu
def test_a_step_is_captured_in_a_cuda_graph():
    s, t = on_gpu(True), on_gpu()

    def step():
        return torch.autograd.grad(fastkd.fsp_loss(s, t, distance="column_l2") + fastkd.fsp_loss(s, t), s)

    with fastkd.use_backend("triton"):
        check_captured(step, [*s, *t])


@gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_runs_the_operators(mode):
    torch.compiler.reset()
    s, t = on_gpu(True), on_gpu()
    compiled = torch.compile(lambda s, t: fastkd.fsp_loss(s, t, precision="ieee"), fullgraph=True, mode=mode)
    want = exact_gradients(s, t)
    with fastkd.use_backend("triton"):
        for _ in range(4):
            got = torch.autograd.grad(compiled(s, t), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@gpu
def test_no_call_waits_for_the_device():
    s, t = on_gpu(True), on_gpu()
    with fastkd.use_backend("triton"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                fastkd.fsp_loss(s, t).backward()
                fastkd.fsp_matrix(s[0], s[1]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves():
    s, t = ([x.to("cuda:1").detach().requires_grad_() for x in on_gpu()] for _ in range(2))
    with fastkd.use_backend("triton"), torch.cuda.device(0):
        got = torch.autograd.grad(fastkd.fsp_loss(s, t, precision="ieee"), s)
    torch.testing.assert_close(
        [x.to("cuda:0") for x in got], list(exact_gradients(s, t)), rtol=1e-4, atol=1e-7
    )


@gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout):
    n, c, size = 700, 1024, 56
    x = torch.randn(n, c, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    assert x.numel() > 2**31
    x.requires_grad_()
    b = torch.randn(n, 16, size, size, device="cuda", dtype=torch.bfloat16)
    upstream = torch.randn(n, c, 16, device="cuda")
    with fastkd.use_backend("triton"):
        g = fastkd.fsp_matrix(x, b)
        (grad,) = torch.autograd.grad(g, x, upstream)
    for i in (0, n - 1):
        part = x[i : i + 1].detach().float().requires_grad_()
        want = ref.fsp_matrix(part, b[i : i + 1], precision="ieee")
        torch.testing.assert_close(g[i : i + 1], want, rtol=1e-4, atol=1e-4)
        (want,) = torch.autograd.grad(want, part, upstream[i : i + 1])
        torch.testing.assert_close(
            grad[i : i + 1].float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item()
        )
