"""tap and relu_tap in a network: what they hand on, which gradients they give, misuse, compiled graphs."""

from __future__ import annotations

import contextlib
import itertools
import random
import weakref

import pytest
import torch
import torch.utils.checkpoint
from support import evaluate, make, ref, values

import fastkd

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def kernels(cpp):
    """Whatever FASTKD_BACKEND says, these tests are about the kernels, unless a test asks for another backend
    itself.
    """
    with fastkd.use_backend(cpp):
        yield


def network(m, x, relu):
    """A feature that is used twice, and its map."""
    if relu:
        y, attention = m.relu_tap(x * 2, x.flip(0))
    else:
        y, attention = m.tap(x * 2)
    return (y.sin() + y.mean((2, 3), keepdim=True)).sum() + m.attention_transfer_loss(
        attention, y.detach().flip(1, 2), weight=50.0, student_is_map=True
    )


@pytest.mark.parametrize("relu", [False, True], ids=["tap", "relu_tap"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_network_with_a_tap_has_the_gradient_of_one_without(layout, relu):
    x = make((3, 6, 5, 7), F64, layout)
    got, want = (evaluate(lambda x: network(m, x, relu), [x]) for m in (fastkd, ref))
    torch.testing.assert_close(got.output, want.output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.grads, want.grads, rtol=1e-10, atol=1e-12)


def test_tap_hands_the_feature_on_without_a_copy():
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    hidden = x * 1
    y, _ = fastkd.tap(hidden)
    assert y.data_ptr() == hidden.data_ptr() and y.shape == x.shape and y.stride() == hidden.stride()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_only_what_is_used_gives_a_gradient(function):
    call = getattr(fastkd, function)
    hidden = values((2, 3, 4, 4), torch.float32)

    def gradient(use, m=fastkd):
        x = hidden.detach().requires_grad_()
        return torch.autograd.grad(use(*getattr(m, function)(x)), x)[0]

    def feature_alone(y, attention):
        return (y * 3).sum()

    want = torch.full_like(hidden, 3) if function == "tap" else 3 * (hidden > 0).float()
    assert torch.equal(gradient(feature_alone), want)
    torch.testing.assert_close(
        gradient(lambda y, a: a.square().sum() + a[0, 1].sum()),
        gradient(lambda y, a: a.square().sum() + a[0, 1].sum(), ref),
    )
    y, attention = call(hidden)
    assert not y.requires_grad and not attention.requires_grad


def test_only_the_input_that_needs_one_gets_a_gradient():
    a, b = values((2, 3, 4, 4), torch.float32), values((2, 3, 4, 4), torch.float32)
    for needs in ((True, False), (False, True)):
        x, r = (v.detach().requires_grad_(need) for v, need in zip((a, b), needs))
        y, attention = fastkd.relu_tap(x, r)
        (y.sum() + attention.sum()).backward()
        assert (x.grad is None, r.grad is None) == (not needs[0], not needs[1])


def test_the_gradients_of_both_addends_are_equal_and_do_not_share_memory():
    x, r = (values((2, 3, 4, 4), torch.float32).requires_grad_() for _ in range(2))
    for times in (1, 2):
        y, attention = fastkd.relu_tap(x, r)
        (y.square().sum() + attention.sum()).backward()
        assert torch.equal(x.grad, r.grad) and x.grad.data_ptr() != r.grad.data_ptr(), times
    want, once = x.grad / 2, values((1,), torch.float32)
    x.grad += once
    assert torch.equal(r.grad / 2, want)


def test_one_tensor_may_be_both_addends():
    x = values((2, 3, 4, 4), F64)
    got, want = (
        evaluate(lambda x: sum((v * v).sum() + (3 * v).sum() for v in m.relu_tap(x, x)), [x])
        for m in (fastkd, ref)
    )
    torch.testing.assert_close(got.grads, want.grads)


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_gradients_come_again_under_retain_graph_and_leave_their_inputs_alone(function):
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    outputs = getattr(fastkd, function)(x)
    grads = torch.randn_like(x), torch.randn(2, 4, 4)
    kept = [g.clone() for g in grads]
    first, second = (torch.autograd.grad(outputs, x, grads, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(grads, kept))


def test_a_feature_changed_before_the_backward_pass_is_caught():
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    hidden = x * 1
    y, attention = fastkd.tap(hidden)
    hidden.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        (y.sum() + attention.sum()).backward()
    y, attention = fastkd.relu_tap(x)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + attention.sum()).backward()


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_inference_mode_and_no_grad_keep_no_graph(function):
    x = values((2, 3, 4, 4), torch.float32)
    want = getattr(ref, function)(x)
    with torch.inference_mode():
        frozen = x.clone()
        inside = getattr(fastkd, function)(frozen)
    with torch.no_grad():
        still = getattr(fastkd, function)(x.clone().requires_grad_())
    for got in (inside, still, getattr(fastkd, function)(frozen)):
        assert not any(v.requires_grad for v in got)
        torch.testing.assert_close([v.clone() for v in got], list(want))


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_a_second_derivative_is_refused_and_names_the_reference(function):
    x = values((2, 3, 4, 4), F64).requires_grad_()

    def first(m):
        y, attention = getattr(m, function)(x)
        return torch.autograd.grad(y.square().sum() + attention.square().max(), x, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=f"fastkd.reference.{function},"):
        first(fastkd).square().sum().backward()
    torch.testing.assert_close(first(fastkd), first(ref))
    first(ref).square().sum().backward()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("relu", [False, True], ids=["tap", "relu_tap"])
@pytest.mark.parametrize("backend, dynamic", [("auto", False), ("cpp", False), ("cpp", True)])
def test_a_network_with_a_tap_compiles_as_one_graph(backend, dynamic, relu):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: network(fastkd, x, relu), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for shape in [(3, 6, 5, 7), (4, 5, 6, 3)][: 1 + dynamic]:
        x = make(shape, F64, random.choice(("contiguous", "channels_last")))
        with fastkd.use_backend(backend):
            got = evaluate(compiled, [x])
        want = evaluate(lambda x: network(ref, x, relu), [x])
        torch.testing.assert_close((got.output, got.grads), (want.output, want.grads), rtol=1e-9, atol=1e-11)


def samples():
    options = (2.0, "mean", False, 1e-12, "clamp")
    for dtype, layout in (
        (torch.float32, "contiguous"),
        (F64, "channels_last"),
        (torch.bfloat16, "sliced"),
        (torch.float32, "swapped"),
    ):
        x, r = (make((2, 3, 5, 4), dtype, layout).requires_grad_(dtype != torch.bfloat16) for _ in range(2))
        yield "relu_tap", (x, r, *options)
        yield "relu_tap", (x, None, 3.0, "sum", True, 0.1, "add")
        y, attention, norm = (v.detach() for v in torch.ops.fastkd.relu_tap(x.detach(), r.detach(), *options))
        for operator, grad in itertools.product(
            ("tap_backward", "relu_tap_backward"), (None, torch.randn_like(y))
        ):
            yield operator, (grad, torch.randn_like(attention), y, attention, norm, *options)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("operator", ["relu_tap", "tap_backward", "relu_tap_backward"])
def test_every_operator_passes_opcheck(operator):
    for other, args in samples():
        if other == operator:
            torch.library.opcheck(getattr(torch.ops.fastkd, operator).default, args)


@pytest.mark.parametrize("kept", ["by autograd", "checkpoint", "save_on_cpu"])
@pytest.mark.parametrize("used", ["feature", "map", "both"])
def test_a_tap_before_an_inplace_relu_names_relu_tap(kept, used):
    def step(x):
        y, attention = fastkd.tap(x * 1)
        y = torch.relu_(y)
        return (y.sin().sum() if used != "map" else 0) + (
            attention.square().sum() if used != "feature" else 0
        )

    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    with torch.autograd.graph.save_on_cpu() if kept == "save_on_cpu" else contextlib.nullcontext():
        loss = (
            torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
            if kept == "checkpoint"
            else step(x)
        )
        with pytest.raises(RuntimeError, match="relu_tap") as caught:
            loss.backward()
    assert "\n" not in str(caught.value)


def test_a_change_of_relu_taps_feature_is_told_where_hooks_keep_it():
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y, attention = fastkd.relu_tap(x)
    (y * 1).add_(1)
    torch.autograd.grad(y.sum() + attention.sum(), x, retain_graph=True)
    y.add_(1)
    with pytest.raises(RuntimeError, match="relu_tap's feature was modified"):
        (y.sum() + attention.sum()).backward()


def test_what_watches_a_feature_holds_no_memory():
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    hidden = x * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        y, attention = fastkd.tap(hidden)
    pointer = weakref.ref(hidden)
    del hidden, y
    assert pointer() is None and attention.grad_fn.watched.untyped_storage().nbytes() == 0
