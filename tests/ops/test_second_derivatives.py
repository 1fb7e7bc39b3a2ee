"""Second derivatives of fastkd.reference where a norm is zero: finite wherever the first one is, and right
where they exist.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from support import values

from fastkd import reference

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def twice(loss, *tensors):
    """The gradients of loss, and the second derivative along a random direction: the gradients of <gradients,
    direction>.
    """
    tensors = [x.detach().requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*tensors), tensors, create_graph=True)
    along = sum((g * torch.randn_like(g)).sum() for g in first)
    second = (
        torch.autograd.grad(along, tensors, allow_unused=True) if along.requires_grad else [None] * len(first)
    )
    return first, [torch.zeros_like(x) if g is None else g for g, x in zip(second, tensors)]


def finite(loss, *tensors):
    first, second = twice(loss, *tensors)
    assert all(g.isfinite().all() for g in first), "the first derivative is not finite: the case says nothing"
    assert all(g.isfinite().all() for g in second)
    return second


def sample(kind, dtype=F64):
    """(2, 3, 4, 3) whose first sample is made so."""
    x = values((2, 3, 4, 3), dtype)
    one = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    x[0] = {"zero": 0.0 * x[0], "tiny": 1e-25 * x[0], "relu": x[0].relu(), "one channel": x[0] * one}[kind]
    return x


@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("p", [1, 1.5, 2, 2.7, 3, 4])
@pytest.mark.parametrize("kind", ["zero", "relu", "one channel"])
def test_maps_with_zeros(kind, p, signed, eps_mode):
    x, t = sample(kind).abs() if signed and p != int(p) else sample(kind), values((2, 3, 4, 3), F64)
    for pool, channel_reduce, eps in itertools.product(("before", "after"), ("mean", "sum"), (1e-12, 1e-2)):
        options = dict(signed=signed, eps_mode=eps_mode, channel_reduce=channel_reduce, eps=eps)
        finite(lambda x: (reference.attention_map(x, p, **options) * t[:, 0]).sum(), x)
        teacher = t[..., :2].abs() if signed else t[..., :2]
        finite(lambda x: reference.attention_transfer_loss(x, teacher, p, pool=pool, **options), x)


@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
def test_tiny_maps_in_float32(eps_mode):
    x, t = sample("tiny", torch.float32), values((2, 3, 4, 3), torch.float32)
    for p in (1, 1.5, 2, 3):
        finite(lambda x: (reference.attention_map(x, p, eps_mode=eps_mode) * t[:, 0]).sum(), x)
        finite(lambda x: reference.attention_transfer_loss(x, t, p, eps_mode=eps_mode), x)


@pytest.mark.parametrize("eps", [1e-2, 1e-3])
def test_the_second_derivative_of_a_zero_map_is_the_one_of_differences(eps):
    """Below eps a map is its powers divided by eps, which is smooth."""
    x, t = torch.zeros(1, 2, 3, 2, dtype=F64), values((1, 2, 3, 2), F64)
    direction, h = torch.randn_like(x), 1e-6

    def gradient(at):
        at = at.requires_grad_()
        return torch.autograd.grad(reference.attention_transfer_loss(at, t, eps=eps), at, create_graph=True)[
            0
        ]

    x.requires_grad_()
    (second,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    differences = (gradient(h * direction) - gradient(-h * direction)).detach() / (2 * h)
    assert differences.abs().max() > 1e-3
    torch.testing.assert_close(second, differences, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("p", [1, 2, 2.7])
def test_equal_maps_under_an_l2_difference(p):
    s, t = values((3, 3, 4, 3), F64, "positive"), values((3, 3, 4, 3), F64, "positive")
    t[1] = s[1]
    alone = finite(lambda s, t: reference.attention_transfer_loss(s, t, p, difference="l2"), s, t)
    # what is equal has no part in it, and the others are as without it
    keep = [0, 2]
    torch.manual_seed(1)
    _, all_three = twice(lambda s: reference.attention_transfer_loss(s, t, p, difference="l2"), s)
    assert not all_three[0][1].any() and all_three[0][keep].any() and alone[0][keep].any()
    finite(lambda s: reference.attention_transfer_loss(s, s.detach(), p, difference="l2", weights=[3.0]), s)


@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
@pytest.mark.parametrize("dead", ["student", "both", "a factor", "equal"])
def test_fsp_with_a_dead_channel(dead, distance):
    s, t = ([values((2, 3, 4, 3), F64), values((2, 4, 4, 3), F64)] for _ in range(2))
    if dead == "equal":
        t = [x.clone() for x in s]
    else:
        s[dead != "a factor"][:, 1] = 0
        if dead == "both":
            t[1][:, 1] = 0
    finite(lambda *x: reference.fsp_loss(x[:2], x[2:], distance=distance), *s, *t)


def test_fsp_with_a_channel_that_all_but_died():
    """Weight decay leaves such numbers; second derivatives of a norm are as large as it is small, and right
    in float32.
    """
    s, t = ([values((2, 3, 4, 3), F64), values((2, 4, 4, 3), F64)] for _ in range(2))
    for side in (s, t):
        side[1][:, 1] *= 1e-20
    found = []
    for dtype in (torch.float32, F64):
        torch.manual_seed(3)
        x, y = (z.to(dtype).requires_grad_() for z in s)
        loss = reference.fsp_loss([x, y], [z.to(dtype) for z in t], distance="column_l2")
        (first,) = torch.autograd.grad(loss, y, create_graph=True)
        found.append(
            torch.autograd.grad((first * torch.randn(first.shape, dtype=F64).to(dtype)).sum(), y)[0].double()
        )
    assert found[1][:, 1].abs().max() > 1e17
    torch.testing.assert_close(found[0][:, 1] * 1e-20, found[1][:, 1] * 1e-20, rtol=1e-3, atol=1e-3)


def test_taps_and_batch_norm():
    x, t = sample("zero"), values((2, 3, 4, 3), F64)
    finite(
        lambda x: sum((y * t.view(y.shape) if y.dim() == 4 else y * t[:, 0]).sum() for y in reference.tap(x)),
        x,
    )
    finite(
        lambda x: sum((y * t if y.dim() == 4 else y * t[:, 0]).sum() for y in reference.relu_tap(x - 1, x)), x
    )
    w = torch.rand(3, dtype=F64)
    flat = torch.ones(2, 3, 4, 3, dtype=F64)
    finite(lambda x, w, b: (reference.batch_norm(x, None, w, b, relu=True) * t).sum(), flat, w, w)


def test_first_derivatives_and_values_at_zero_are_as_before():
    """A zero norm gives the gradient that torch.linalg.vector_norm gives it, zero; values do not change."""
    x = sample("zero").requires_grad_()
    y = reference.attention_map(x)
    assert not y[0].any()
    torch.testing.assert_close(
        y[1], torch.nn.functional.normalize(x[1].square().mean(0).flatten(), dim=0).view(4, 3)
    )
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad[0].any() and grad[1].any()
    s = values((2, 3, 4, 3), F64).requires_grad_()
    loss = reference.attention_transfer_loss(s, s.detach(), difference="l2")
    assert loss == 0 and not torch.autograd.grad(loss, s)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_norm_is_pytorchs_to_the_last_bit(dtype):
    for scale in (1.0, 1e-12, 1e-25, 1e15):
        x = (values((5, 7, 3), dtype) * scale).requires_grad_()
        ours, pytorchs = reference.common.vector_norm(x, 1), torch.linalg.vector_norm(x, dim=1, keepdim=True)
        assert torch.equal(ours, pytorchs)
        (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (ours, pytorchs))
        torch.testing.assert_close(a, b)
