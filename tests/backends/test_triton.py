"""Triton's side of the operations: choosing it, what it refuses, the same bits in each run."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from child_process import python
from recorder import fused_only
from second_derivatives import SCALARS, refused
from support import dtypes, evaluate, make, missing, ref, values

import fastkd
from fastkd import kernels
from fastkd._bits import ATTENTION

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
OPTIONS = (2.0, "mean", False, 1e-12, "clamp")


def chains(place, grad=True, dtype=torch.float32, layout="contiguous"):
    return [
        [
            place(make((3, c, n, n), dtype, layout)).requires_grad_(grad and not i)
            for c, n in ((4, 9), (8, 7), (16, 4))
        ]
        for i in (0, 1)
    ]


# choosing


def test_float64_is_refused_by_name(triton):
    x, y = triton(torch.ones(2, 3, 4, 4, dtype=torch.float64)), triton(torch.ones(2, 3, 4, 4))
    for call in (
        lambda: fastkd.attention_map(x),
        lambda: fastkd.tap(x),
        lambda: fastkd.relu_tap(x),
        lambda: fastkd.attention_transfer_loss([y, y], [y, x]),
        lambda: fastkd.fsp_matrix(y, x),
        lambda: fastkd.fsp_loss([y, y], [y, x]),
    ):
        with pytest.raises(fastkd.BackendError, match="float64"):
            call()


def test_misuse_is_told_as_by_other_backends(triton):
    x = triton(torch.ones(2, 3, 4, 4))
    for call, word in (
        (lambda: fastkd.attention_map(x, 0.5), "p is 0.5"),
        (lambda: fastkd.attention_map(x, eps=-1.0), "eps is"),
        (lambda: fastkd.attention_map(x, channel_reduce="max"), "channel_reduce"),
        (lambda: fastkd.attention_transfer_loss([x, x], [x]), "stages"),
        (lambda: fastkd.attention_transfer_loss(x, x[:1]), "batch sizes"),
        (lambda: fastkd.attention_transfer_loss(x, x, weights=[1.0, 2.0]), "weights has 2"),
        (lambda: fastkd.attention_transfer_loss(x, x[0], teacher_is_map=True), "batch sizes|dimensions|map"),
        (lambda: fastkd.attention_transfer_loss(x, x.to("meta")), "devices differ"),
        (lambda: fastkd.attention_map(x[:0]), "empty batch"),
        (lambda: fastkd.relu_tap(x, x[:, :1]), "residual is"),
        (lambda: fastkd.fsp_matrix(x, x[:1]), "batch sizes"),
        (lambda: fastkd.fsp_matrix(x, x[0]), "batch sizes|dimensions"),
        (lambda: fastkd.fsp_matrix(x, x, pool_mode="mean"), "pool_mode"),
        (lambda: fastkd.fsp_matrix(x.bfloat16(), x.bfloat16(), precision="tf16"), "precision"),
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


def test_importing_fastkd_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import fastkd; assert before or 'triton' not in"
        " sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_a_graph_on_the_cpu_is_refused(triton):
    if torch.cuda.is_available():
        pytest.skip("not interpreted")
    with pytest.raises(Exception, match="serves CUDA tensors only"):
        torch.compile(fastkd.attention_map, backend="eager", fullgraph=True)(torch.ones(1, 2, 3))


# what every call keeps


def test_results_are_the_same_bits_in_each_run(triton):
    s, t = chains(triton, layout=random.choice(("contiguous", "channels_last")))
    x, r = (triton(make((2, 40, 35, 33))).requires_grad_() for _ in range(2))

    def bits():
        loss = fastkd.attention_transfer_loss(s, t, 3.0)
        y, attention = fastkd.relu_tap(x, r)
        return [
            loss,
            *torch.autograd.grad(loss, s),
            y,
            attention,
            *torch.autograd.grad(attention[:, 3].sum() + y.sum(), (x, r)),
        ]

    first = bits()
    assert all(torch.equal(a, b) for a, b in zip(first, bits()))


def test_nothing_as_large_as_a_feature_is_allocated_but_gradients(triton, monkeypatch):
    """In any layout: maps, coefficients and scratch memory are a small part of a feature of many channels."""
    from fastkd.kernels.common.launch import Launch

    layouts = ("contiguous", "channels_last", "stepped", "expanded_batch")
    pairs = [[triton(make((2, 300, 5, 6), torch.float32, layout)) for _ in range(2)] for layout in layouts]
    made = []
    for name in ("new_empty", "new_zeros", "contiguous"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, o=original, **k: made.append(o(*a, **k)) or made[-1]
        )
    run = Launch.__call__

    def launched(*args):
        count = len(made)
        run(*args)
        del made[count:]  # the interpreter's own

    monkeypatch.setattr(Launch, "__call__", launched)
    for s, t in pairs:
        loss = fastkd.attention_transfer_loss(s.requires_grad_(), t)
        torch.autograd.grad(loss, s)
        y, attention = fastkd.relu_tap(s)
        torch.autograd.grad(
            (y, attention),
            s,
            (torch.ones_like(y), torch.ones_like(attention).transpose(1, 2).contiguous().transpose(1, 2)),
        )
    assert made and max(x.numel() for x in made) * 4 <= s.numel()


@pytest.mark.parametrize("function", [fastkd.attention_transfer_loss, fastkd.fsp_loss])
def test_gradients_come_again_under_retain_graph_and_other_upstreams(triton, function):
    s, t = chains(triton)
    loss = function(s, t, weight=1000.0)
    first = torch.autograd.grad(loss, s, retain_graph=True)
    again = torch.autograd.grad(loss, s, retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, s)
    assert all(torch.equal(a, b) and torch.equal(a * 0.5, c) for a, b, c in zip(first, again, half))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("p", [5, 6])
def test_large_whole_powers_keep_their_sign(triton, p, signed):
    x = make((2, 3, 4, 4))
    grad = torch.ones(2, 4, 4)
    got = evaluate(
        lambda x: fastkd.attention_map(x, p, signed=signed, normalize=False),
        [triton(x)],
        upstream=triton(grad),
    )
    want = evaluate(lambda x: ref.attention_map(x, p, signed=signed, normalize=False), [x], upstream=grad)
    torch.testing.assert_close(
        (got.output.cpu(), got.grads[0].cpu()), (want.output, want.grads[0]), rtol=1e-5, atol=1e-5
    )


def test_the_same_tensor_may_stand_at_several_places(triton):
    a, b = (values((2, 4, 5, 5), torch.float32) for _ in range(2))

    def call(m, a, b):
        return (
            m.attention_transfer_loss([a, b, a], [b, b, a], 3.0)
            + m.tap(a)[1].square().sum()
            + m.relu_tap(a, a)[1][0].sum()
        )

    got = evaluate(lambda a, b: call(fastkd, a, b), [triton(a), triton(b)])
    want = evaluate(lambda a, b: call(ref, a, b), [a, b])
    torch.testing.assert_close([g.cpu() for g in got.grads], list(want.grads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [fastkd.attention_transfer_loss, fastkd.fsp_loss])
def test_a_teacher_may_come_from_inference_mode(triton, function):
    s, t = chains(triton)
    with torch.inference_mode():
        frozen = [x.clone() for x in t]
    for a, b in zip(*(torch.autograd.grad(function(s, other), s) for other in (frozen, t))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", SCALARS)
def test_a_second_derivative_is_refused_and_names_the_reference(triton, function):
    x, y = (triton(values((2, 3, 4, 4), torch.float32)).requires_grad_() for _ in range(2))
    grad = refused(function, x, y)
    assert torch.equal(grad, torch.autograd.grad(SCALARS[function](fastkd, x, y), x)[0])


@pytest.mark.parametrize("pool", ["before", "after"])
def test_the_operator_gives_what_its_schema_says(triton, pool):
    """The launchers as operators: for graphs, and for whoever calls them directly; with gradients for an
    upstream that is foreseen.
    """
    from fastkd.ops._attention_operators import _loss_fake

    s, t = chains(triton, grad=False)
    t[0] = t[0][..., :5, :6]
    options = ATTENTION.pack(
        channel_reduce="mean", pool=pool, student_grad=True, teacher_grad=True, prepare=True
    )
    args = (s, t, options, [-2.5, 2.0, 1e-12, 3.0])
    got, fake = kernels.launcher("attention_transfer_loss")(*args), _loss_fake(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)
    leaves = [x.clone().requires_grad_() for x in s]
    want = torch.autograd.grad(
        fastkd.attention_transfer_loss(leaves, t, weight=3.0, pool=pool) * -2.5, leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(got[2], want))


# on a GPU


def test_every_layout_of_both_sides_meets_every_other(triton):
    """The two sides are walked and divided each in its own way."""
    for a, b in itertools.product(("contiguous", "channels_last", "stepped"), repeat=2):
        s, t = (
            make((2, 12, 6, 5), random.choice(dtypes("triton")), a),
            make((2, 7, 6, 5), random.choice(dtypes("triton")), b),
        )
        with fused_only(backend="triton"):
            loss = fastkd.attention_transfer_loss(triton(s), triton(t))
        torch.testing.assert_close(loss.cpu(), ref.attention_transfer_loss(s, t), rtol=1e-5, atol=1e-8)
