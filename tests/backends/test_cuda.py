"""The CUDA library: what it serves, by whom it is chosen, what every call keeps. Its values are in the grids
of the operations' own tests, which run it on a GPU, or on a CPU thread by thread.
"""

from __future__ import annotations

import random

import emulated
import pytest
import torch
from cuda_cases import chains, step
from recorder import fused_only
from support import KERNELS, check_loss, dtypes, make, ref, values

import fastkd
from fastkd import native

pytestmark = [pytest.mark.usefixtures("one_thread")]


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


@pytest.mark.parametrize("shape", [(1, 1, 2**30 + 1), (1, 2**30 + 1, 1)])
def test_samples_beyond_what_kernels_count_are_refused(cuda, shape):
    x = cuda(torch.ones(1, 1, 1)).expand(shape)
    positions = cuda(torch.ones(1, 1, 1)).expand(1, 1, 2**30 + 1)
    for call in (lambda: fastkd.attention_map(x), lambda: fastkd.fsp_matrix(positions, positions)):
        with pytest.raises(RuntimeError, match=f"a sample of {2**30 + 1} positions or channels"):
            call()
