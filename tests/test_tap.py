"""tap and relu_tap: the C++ kernels against the law in float64, over dtypes, layouts, shapes and switches; losses over tapped maps."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from recorder import fused_only
from support import (
    DENSE,
    DTYPES,
    LAYOUTS,
    TERM_ULPS,
    arrange,
    check_loss,
    eager_error,
    evaluate,
    law,
    make,
    name,
    nudged,
    some_shape,
    uncancelled,
    values,
    within_budget,
)

import fastkd
from fastkd import native

POWERS = (1, 1.5, 2, 2.7, 3)
SHAPES = (
    (1, 1, 6),
    (2, 3, 7, 7),
    (1, 17, 13),
    (2, 64, 8, 8),
    (1, 31, 33, 31),
    (2, 5, 3, 4, 5),
    (3, 2, 1, 7),
    (1, 130, 16, 16),
    (1, 9, 80, 70),
)
F64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def kernels(cpp):
    """Whatever FASTKD_BACKEND says, these tests are about the kernels, unless a test asks for another backend itself."""
    with fastkd.use_backend(cpp):
        yield


def gated(grad, y):
    """grad behind a ReLU of result y; y itself may be NaN, and then lets pass."""
    return torch.where(y <= 0, torch.zeros_like(grad), grad)


def strides(x):
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def check_tap(function, x, residual=None, *, grad="contiguous", map_scale=1.0, **switches):
    """The function of that name under the C++ backend against the law: feature and map, and the gradient of both together."""
    relu = function == "relu_tap"
    inputs = [x.detach().requires_grad_(), *([] if residual is None else [residual.detach().requires_grad_()])]
    map_grad = map_scale * torch.randn(x.shape[0], *x.shape[2:], dtype=F64)
    grad = None if grad is None else make(x.shape, x.dtype, grad)
    with fastkd.use_backend("cpp"), fused_only():
        y, attention = getattr(fastkd, function)(*inputs, **switches)
        outputs, grads = (
            ((attention,), (map_grad.to(attention.dtype),)) if grad is None else ((y, attention), (grad, map_grad.to(attention.dtype)))
        )
        got = torch.autograd.grad(outputs, inputs, grads)

    plain = [v.detach() for v in inputs]
    want = torch.relu(sum(plain[1:], start=plain[0])) if relu else plain[0]
    assert y.dtype == x.dtype and torch.equal(y.detach(), want)

    def exact_map(z):
        return law.attention_map(z, **switches)

    def gradient(z, result):
        total = result.grads[0] if grad is None else result.grads[0] + grad.to(result.grads[0].dtype)
        return gated(total, z) if relu else total

    z = want.contiguous()
    wide = F64 if x.dtype == F64 else torch.float32
    exact, eager, moved = (evaluate(exact_map, [v], upstream=map_grad) for v in (z.double(), z.float(), nudged(z)))
    assert attention.dtype == wide
    within_budget("map", attention.detach(), exact.output, eager_error(exact.output, (eager.output, moved.output), wide))
    dx = gradient(z, exact)
    rough = [gradient(z, r) for r in (eager, moved)]
    terms = gradient(z, uncancelled(exact_map, [z], None, map_grad)).abs().max().item()
    for g in got:
        assert g.dtype == x.dtype
        within_budget("gradient", g, dx, eager_error(dx, rough, wide), terms=TERM_ULPS * torch.finfo(wide).eps * terms)
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        assert strides(y) == strides(got[0]) == strides(x)


# values and gradients


@pytest.mark.parametrize("p, signed, channel_reduce", list(itertools.product(POWERS, [False, True], ["mean", "sum"])))
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_taps_match_the_law_for_every_switch(dtype, p, signed, channel_reduce):
    switches = dict(
        p=p, signed=signed, channel_reduce=channel_reduce, eps_mode=random.choice(("clamp", "add")), eps=random.choice((1e-12, 0.5))
    )
    shape = some_shape()
    kind = "positive" if signed and p != int(p) else "normal"
    check_tap("tap", make(shape, dtype, random.choice(LAYOUTS), kind), grad=random.choice((*LAYOUTS, None)), **switches)
    residual = make(shape, dtype, random.choice(LAYOUTS)) if random.random() < 0.7 else None
    check_tap("relu_tap", make(shape, dtype, random.choice(LAYOUTS)), residual, grad=random.choice((*LAYOUTS, None)), **switches)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_taps_match_the_law_in_every_layout(shape, layout):
    for function in ("tap", "relu_tap"):
        check_tap(function, make(shape, random.choice(DTYPES), layout), grad=layout)
    dtype = random.choice(DTYPES)
    check_tap("relu_tap", make(shape, dtype, layout), make(shape, dtype, layout), grad=layout)


@pytest.mark.parametrize("grad", [*LAYOUTS, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_incoming_gradients_may_have_any_strides_or_be_missing(function, layout, grad):
    for dtype in DTYPES:
        check_tap(function, make((2, 19, 6, 7), dtype, layout), grad=grad, map_scale=100.0)


@pytest.mark.parametrize("layouts", list(itertools.permutations(["contiguous", "channels_last", "stepped"], 2)), ids="-".join)
def test_a_residual_may_lie_otherwise_than_the_feature(layouts):
    for dtype in DTYPES:
        x, residual = (make((2, 19, 5, 9), dtype, layout) for layout in layouts)
        check_tap("relu_tap", x, residual, grad=random.choice(layouts))


def test_energies_are_those_of_the_rounded_sum():
    """256 + 0.9 is 256 in bfloat16: a map of the unrounded sum would tell the two channels' positions apart."""
    x = torch.full((1, 1, 40), 256.0, dtype=torch.bfloat16)
    residual = torch.linspace(0, 0.9, 40).bfloat16().view(1, 1, 40)
    for layout in ("contiguous", "stepped"):
        with fastkd.use_backend("cpp"):
            y, attention = fastkd.relu_tap(arrange(x, layout), arrange(residual, layout))
        assert (y == 256).all() and (attention == attention[0, 0]).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_relu_tap_treats_nan_and_infinity_as_relu_does(dtype, layout):
    x = make((3, 17, 5, 4), dtype, layout)
    x[0, 3, 2, 1], x[1, 5, 0, 0], x[1, 2, 1, 1], x[2] = torch.nan, torch.inf, -torch.inf, x[2].abs()
    grad, map_grad = torch.randn_like(x), torch.randn(3, 5, 4)
    results = []
    for module in (fastkd, law):
        leaf = x.detach().requires_grad_()
        y, attention = module.relu_tap(leaf)
        (dx,) = torch.autograd.grad((y, attention), leaf, (grad, map_grad.to(attention.dtype)))
        results.append((y.detach(), attention.detach(), dx))
    for got, want in zip(*results):
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-2 if dtype in DTYPES[:2] else 1e-4, atol=1e-2)


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_zero_features_have_zero_maps_and_pass_the_gradient_on(function):
    x = torch.zeros(2, 3, 4, 5, requires_grad=True)
    y, attention = getattr(fastkd, function)(x)
    grad = torch.randn_like(x)
    (dx,) = torch.autograd.grad((y, attention), x, (grad, torch.randn(2, 4, 5)))
    assert (attention == 0).all() and torch.equal(dx, grad if function == "tap" else torch.zeros_like(x))


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
def test_taps_pass_gradcheck(function):
    x, r = (values((2, 3, 3, 2), F64).requires_grad_() for _ in range(2))
    call = getattr(fastkd, function)
    assert torch.autograd.gradcheck(lambda x: call(x), x)
    assert torch.autograd.gradcheck(lambda x: call(x, p=3.0, signed=True, eps_mode="add", eps=0.1), x)
    if function == "relu_tap":
        assert torch.autograd.gradcheck(lambda x, r: call(x, r), (x, r))


def test_results_agree_to_the_bit_between_runs_and_thread_counts():
    x, r, grad = (make((6, 33, 17, 19), torch.float32, random.choice(DENSE)) for _ in range(3))
    map_grad = torch.randn(6, 17, 19)
    seen = []
    for threads in (1, 3, 1):
        torch.set_num_threads(threads)
        for function, inputs in (("tap", (x,)), ("relu_tap", (x, r))):
            leaves = [v.detach().requires_grad_() for v in inputs]
            outputs = getattr(fastkd, function)(*leaves)
            seen.append([v.detach() for v in (*outputs, *torch.autograd.grad(outputs, leaves, (grad, map_grad)))])
    for other in seen[2:4], seen[4:]:
        assert all(torch.equal(a, b) for first, second in zip(seen[:2], other) for a, b in zip(first, second))


def test_relu_tap_makes_the_map_of_its_result_to_the_bit():
    """In place, both sum the same numbers in the same order, whatever the pieces."""
    for shape, layout in itertools.product([(2, 33, 13, 13), (1, 300, 7, 9), (2, 5, 70, 70)], ["contiguous", "channels_last"]):
        y, attention = fastkd.relu_tap(make(shape, torch.float32, layout))
        assert torch.equal(attention, fastkd.attention_map(y))


@pytest.mark.parametrize("path", native.CPU_PATHS)
def test_every_code_path_gives_the_same_answers(path):
    """The grid above runs on the path in force; here each is forced, in a process of its own."""
    code = """
import sys, torch, fastkd
torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(1)
for dtype, tolerance in ((torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)):
    for shape in ((2, 33, 7, 7), (1, 3, 5, 4), (1, 5, 2, 3)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x, r, g = (torch.randn(shape, dtype=dtype).to(memory_format=memory) for _ in range(3))
            for p in (2.0, 3.0, 2.7):
                both = []
                for m in (fastkd, fastkd.reference):
                    a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
                    t, q = m.tap(a, p)
                    y, k = m.relu_tap(t, b, p)
                    w = torch.linspace(-3, 5, k.numel()).view_as(k).to(k.dtype)
                    both.append([t, q, y, k, *torch.autograd.grad((y, q, k), (a, b), (g, w, w))])
                for got, want in zip(*both):
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1, want.abs().max().item()))
"""
    env = {**os.environ, "FASTKD_CPU": path, "OMP_NUM_THREADS": "1", "FASTKD_BACKEND": "cpp"}
    done = subprocess.run([sys.executable, "-c", code, str(random.randrange(2**31))], env=env, capture_output=True, text=True, timeout=300)
    if "that this CPU can run" in done.stderr:
        pytest.skip(f"this CPU has no {path}")
    assert done.returncode == 0, done.stderr


# maps on the student's side of the loss


@pytest.mark.parametrize("difference", ["squared", "l2"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "-".join(map(name, pair)))
def test_loss_takes_maps_of_the_student(dtypes, difference):
    n = random.choice((1, 3))
    student = [make((n, *some_shape()[2:]), dtypes[0], random.choice(("contiguous", "reversed", "stepped"))) for _ in range(2)]
    teacher = [make((n, random.choice((1, 5, 19)), *s.shape[1:]), dtypes[1], random.choice((*DENSE, "stepped"))) for s in student]
    switches = dict(
        difference=difference, student_is_map=True, weights=[2.0, 0.5], weight=10.0, channel_reduce=random.choice(("mean", "sum"))
    )
    check_loss("cpp", "attention_transfer_loss", student, teacher, **switches)
    check_loss(
        "cpp", "attention_transfer_loss", student, [law.attention_map(t).to(t.dtype) for t in teacher], teacher_is_map=True, **switches
    )


@pytest.mark.parametrize("pool, pool_mode", list(itertools.product(["before", "after"], ["avg", "max"])))
def test_a_students_map_may_be_smaller_than_the_teacher(pool, pool_mode):
    student, teacher = make((3, 4, 5), random.choice(DTYPES)), make((3, 7, 9, 5), random.choice(DTYPES), random.choice(LAYOUTS[:6]))
    check_loss("cpp", "attention_transfer_loss", [student], [teacher], student_is_map=True, pool=pool, pool_mode=pool_mode)


def test_a_loss_over_tapped_maps_is_the_loss_over_features():
    s, t = ([make((4, c, n, n), F64) for c, n in ((3, 8), (5, 4))] for _ in range(2))

    def tapped(m, s, t):
        return m.attention_transfer_loss([m.tap(x)[1] for x in s], [m.tap(x)[1] for x in t], student_is_map=True, teacher_is_map=True)

    want = evaluate(lambda *x: law.attention_transfer_loss(x[:2], x[2:]), [*s, *t])
    for m in (fastkd, law):
        got = evaluate(lambda *x: tapped(m, x[:2], x[2:]), [*s, *t])
        torch.testing.assert_close((got.output, got.grads), (want.output, want.grads), rtol=1e-9, atol=1e-12)
    module = fastkd.AttentionTransfer(student_is_map=True, weight=2.0)
    torch.testing.assert_close(module([fastkd.tap(x)[1] for x in s], t), 2 * want.output)
