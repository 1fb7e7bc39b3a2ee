"""The CUDA library: what it serves, by whom it is chosen, what every call keeps. Its values are in the grids
of the operations' own tests, which run it on a GPU, or on a CPU thread by thread.
"""

from __future__ import annotations

import random

import emulated
import pytest
import torch
from cuda_graphs import check_captured
from recorder import fused_only
from support import KERNELS, check_loss, dtypes, gpu, make, place, ref, values

import fastkd
from fastkd import native
from fastkd._bits import ATTENTION, FSP

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.fixture(params=KERNELS[2:])
def cuda(request):
    with fastkd.use_backend("cuda"):
        yield lambda x: place(x, "cuda")


def chains(place, dtype=torch.float32, layout="contiguous"):
    return [
        [place(make((3, c, n, n), dtype, layout)).requires_grad_(not i) for c, n in ((4, 9), (8, 7), (16, 4))]
        for i in (0, 1)
    ]


def step(s, t, **switches):
    loss = fastkd.attention_transfer_loss(s, t, **switches) + fastkd.fsp_loss(s, t)
    y, attention = fastkd.relu_tap(s[0], t[0])
    return [loss, y, attention, *torch.autograd.grad(loss + attention[:, 3].sum() + y.sum(), s)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_presets_are_served(cuda, dtype, layout):
    s, t = chains(cuda, dtype, layout)
    for module in (fastkd.AttentionTransfer, fastkd.FSP):
        for name in module.presets:
            with fused_only(backend="cuda"):
                torch.autograd.grad(module.preset(name)(s, t), s)
    ones = torch.ones_like(s[1][:, 0], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with fused_only(backend="cuda"):
        attention = fastkd.tap(s[0])[1]
        torch.autograd.grad(fastkd.attention_transfer_loss(attention, t[0], student_is_map=True), s[0])
        torch.autograd.grad(fastkd.relu_tap(s[1])[1], s[1], ones)


def test_what_is_not_served_is_refused_by_name_and_why(cuda):
    x, small = cuda(torch.ones(2, 3, 4, 4)), cuda(torch.ones(2, 3, 2, 2))
    for call, why in (
        (lambda: fastkd.attention_map(x, 3.0), "p = 2, not 3"),
        (lambda: fastkd.tap(x, 3.0), "p = 2, not 3"),
        (lambda: fastkd.relu_tap(x, None, 3.0), "p = 2, not 3"),
        (lambda: fastkd.attention_transfer_loss(x, x, 3.0), "p = 2, not 3"),
        (lambda: fastkd.attention_transfer_loss(x, small), "equal spatial size"),
        (lambda: fastkd.attention_transfer_loss([x] * 17, [x] * 17), "16 stages, not 17"),
        (lambda: fastkd.fsp_loss([x] * 17, [x] * 17), "16 stages, not 17"),
    ):
        with pytest.raises(fastkd.BackendError, match=f"cannot serve the call: .*{why}"):
            call()


def test_as_many_stages_as_are_served(cuda):
    s = [cuda(make((2, 3 + i % 3, 4, 5), torch.float32, "contiguous")).requires_grad_() for i in range(16)]
    t = [cuda(torch.randn_like(x)) for x in s]
    want = ref.attention_transfer_loss(s, t) + ref.fsp_loss(s, t)
    got = fastkd.attention_transfer_loss(s, t) + fastkd.fsp_loss(s, t)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, s), torch.autograd.grad(want, s)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_misuse_is_told_as_by_other_backends(cuda):
    x = cuda(torch.ones(2, 3, 4, 4))
    for call, word in (
        (lambda: fastkd.attention_map(x, eps=-1.0), "eps is"),
        (lambda: fastkd.attention_map(x, channel_reduce="max"), "channel_reduce"),
        (lambda: fastkd.attention_transfer_loss([x, x], [x]), "stages"),
        (lambda: fastkd.attention_transfer_loss(x, x[:1]), "batch sizes"),
        (lambda: fastkd.attention_transfer_loss(x, x, weights=[1.0, 2.0]), "weights has 2"),
        (lambda: fastkd.attention_transfer_loss(x, x.to("meta")), "devices differ"),
        (lambda: fastkd.attention_map(x[:0]), "empty batch"),
        (lambda: fastkd.relu_tap(x, x[:, :1]), "residual is"),
        (lambda: fastkd.fsp_matrix(x, x[:1]), "batch sizes"),
        (lambda: fastkd.fsp_matrix(x, x[0]), "batch sizes|dimensions"),
        (lambda: fastkd.fsp_matrix(x, x, pool_mode="mean"), "pool_mode"),
        (lambda: fastkd.fsp_matrix(x, x, precision="tf16"), "precision"),
        (lambda: fastkd.fsp_matrix(x, x.to("meta")), "devices differ"),
        (lambda: fastkd.fsp_loss([x], [x]), "at least 2"),
        (lambda: fastkd.fsp_loss([x, x], [x, x[:, :2]]), "channels differ"),
        (lambda: fastkd.fsp_loss([x, x], [x, x], distance="l1"), "distance"),
        (lambda: fastkd.fsp_loss([x, x], [x, x], pair_reduce="max"), "pair_reduce"),
        (lambda: fastkd.fsp_loss([x, x], [x, x], weights=[1.0, 2.0]), "weights has 2"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    with pytest.raises(TypeError, match="int64"):
        fastkd.attention_map(x.long())


@pytest.mark.parametrize("first, last, channels", [(0, 16, 19), (1, 17, 24), (4, 20, 24), (0, 15, 16)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS[2:])
def test_channels_of_a_wider_feature_match_the_reference(backend, layout, first, last, channels):
    """As after a concatenation: what begins, or lies between samples, rows or positions, may be no multiple
    of 16 bytes.
    """
    for size in ((5, 5), (4, 4)):
        student, teacher = (
            make((3, channels, *size), random.choice(dtypes(backend)), layout)[:, first:last]
            for _ in range(2)
        )
        check_loss(backend, "attention_transfer_loss", [student], [teacher])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_results_are_the_same_bits_in_each_run_and_order_of_threads(cuda, layout):
    s, t = chains(cuda, random.choice((torch.float32, torch.bfloat16)), layout)
    large = [cuda(make((2, 40, 35, 33), torch.float32, layout)).requires_grad_(not i) for i in range(2)]
    first, wide = step(s, t), step(large[:1] * 2, large[1:] * 2)
    for turned in (False, True):
        if native.EMULATED:
            emulated.backwards(turned)
        try:
            assert all(torch.equal(a, b) for a, b in zip(first, step(s, t), strict=True))
            assert all(
                torch.equal(a, b) for a, b in zip(wide, step(large[:1] * 2, large[1:] * 2), strict=True)
            )
        finally:
            if native.EMULATED:
                emulated.backwards(False)


@pytest.mark.parametrize("function", [fastkd.attention_transfer_loss, fastkd.fsp_loss])
def test_gradients_come_again_under_retain_graph_and_other_upstreams(cuda, function):
    s, t = chains(cuda)
    loss = function(s, t, weight=1000.0)
    first = torch.autograd.grad(loss, s, retain_graph=True)
    again = torch.autograd.grad(loss, s, retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, s)
    assert all(torch.equal(a, b) and torch.equal(a * 0.5, c) for a, b, c in zip(first, again, half))


@pytest.mark.parametrize("function", [fastkd.attention_transfer_loss, fastkd.fsp_loss])
def test_a_teacher_may_come_from_inference_mode(cuda, function):
    s, t = chains(cuda)
    with torch.inference_mode():
        frozen = [x.clone() for x in t]
    for a, b in zip(*(torch.autograd.grad(function(s, other), s) for other in (frozen, t))):
        assert torch.equal(a, b)


def test_the_same_tensor_may_stand_at_several_places(cuda):
    a, b = (cuda(values((2, 4, 5, 5), torch.float32)).requires_grad_() for _ in range(2))

    def call(m):
        return (
            m.attention_transfer_loss([a, b, a], [b, b, a])
            + m.tap(a)[1].square().sum()
            + m.relu_tap(a, a)[1][0].sum()
            + m.fsp_loss([a, a], [b, a])
        )

    got, want = (torch.autograd.grad(call(m), (a, b)) for m in (fastkd, ref))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


SECOND = {
    "attention_map": lambda x, y: fastkd.attention_map(x).square().sum(),
    "attention_transfer_loss": lambda x, y: fastkd.attention_transfer_loss([x, x], [y, y]),
    "fsp_matrix": lambda x, y: fastkd.fsp_matrix(x, y).square().sum(),
    "fsp_loss": lambda x, y: fastkd.fsp_loss([x, x], [y, y]),
    "tap": lambda x, y: sum(v.square().sum() for v in fastkd.tap(x)),
    "relu_tap": lambda x, y: sum(v.square().sum() for v in fastkd.relu_tap(x, y)),
}


@pytest.mark.parametrize("function", SECOND)
def test_a_second_derivative_is_refused_and_names_the_reference(cuda, function):
    x, y = (cuda(values((2, 3, 4, 4), torch.float32)).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(SECOND[function](x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"fastkd.reference.{function},"):
        grad.square().sum().backward()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss", "relu_tap"])
def test_operators_stand_in_traced_graphs(cuda, function):
    torch.compiler.reset()
    s, t = ([x.detach() for x in chain] for chain in chains(cuda))
    s = [x.requires_grad_() for x in s]

    def call(s, t):
        if function == "relu_tap":
            return sum((v * v).sum() for x, y in zip(s, t) for v in fastkd.relu_tap(x, y))
        return getattr(fastkd, function)(s, t, weight=3.0)

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    got = torch.autograd.grad(torch.compile(call, backend=keep, fullgraph=True)(s, t), s)
    assert f"fastkd_cuda.{function}.default" in "".join(graphs)
    torch.testing.assert_close(got, torch.autograd.grad(call(s, t), s))


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.unpoisoned
def test_operators_keep_what_their_schemas_say(cuda):
    ops = torch.ops.fastkd_cuda
    s, t = chains(cuda)
    x = s[0].detach().requires_grad_()
    transfer = ATTENTION.pack(channel_reduce="mean", pool="before", student_grad=True)
    chain = FSP.pack(precision="ieee", with_grad=True)
    for operator, args in (
        (ops.attention_map, (x, 2.0, "mean", False, True, 1e-12, "clamp")),
        (ops.relu_tap, (x, t[0], 2.0, "mean", False, 1e-12, "clamp")),
        (ops.attention_transfer_loss, (s, t, transfer, [0.0, 2.0, 1e-12, 3.0])),
        (ops.fsp_matrix, (x, t[1], FSP.pack(precision="ieee"))),
        (ops.fsp_loss, (s, t, chain, [0.0, 1.0])),
    ):
        torch.library.opcheck(operator.default, args, test_utils=OPCHECKS)


# on a GPU


@gpu
@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss", "relu_tap"])
def test_a_step_is_captured_in_a_cuda_graph(cuda, function):
    s, t = ([torch.randn(4, c, n, n, device="cuda") for c, n in ((16, 32), (64, 7))] for _ in range(2))
    s = [x.requires_grad_() for x in s]

    def run():
        if function == "relu_tap":
            return torch.autograd.grad(
                sum((v * v).sum() for x, y in zip(s, t) for v in fastkd.relu_tap(x, y)), s
            )
        return torch.autograd.grad(getattr(fastkd, function)(s, t, weight=1000.0), s)

    check_captured(run, [*s, *t])


@gpu
def test_no_call_waits_for_the_device(cuda):
    s, t = chains(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            step(s, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_two_streams_do_not_share_their_tickets(cuda):
    pairs = [chains(cuda) for _ in range(2)]
    want = [step(*pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, pair in zip(streams, pairs):
            with torch.cuda.stream(stream):
                got.append(step(*pair))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for g, w in zip(got, want) for a, b in zip(g, w))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_current_serves(cuda):
    s, t = (
        [torch.randn(4, c, 9, 9, device="cuda:1", requires_grad=True) for c in (16, 24)] for _ in range(2)
    )
    with torch.cuda.device(0):
        got = torch.autograd.grad(fastkd.attention_transfer_loss(s, t) + fastkd.fsp_loss(s, t), s)
    want = torch.autograd.grad(ref.attention_transfer_loss(s, t) + ref.fsp_loss(s, t), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(cuda, layout):
    n, c, size = 172, 4096, 56
    x = torch.randn(n, c, size, size, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    assert x.numel() > 2**31
    x.requires_grad_()
    t = torch.randn(n, 8, size, size, device="cuda")
    (grad,) = torch.autograd.grad(fastkd.attention_transfer_loss(x, t, weight=1e6), x)
    for i in (0, n - 1):
        part = x[i : i + 1].detach().float().requires_grad_()
        (want,) = torch.autograd.grad(ref.attention_transfer_loss(part, t[i : i + 1], weight=1e6 / n), part)
        torch.testing.assert_close(
            grad[i : i + 1].float(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item()
        )
