"""tap and relu_tap: C++ and Triton kernels against the reference in float64, over dtypes, layouts, shapes,
switches; losses over maps.
"""

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
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    TERM_ULPS,
    arrange,
    check_loss,
    drawn,
    dtypes,
    eager_error,
    evaluate,
    make,
    missing,
    name,
    nudged,
    one_by_one,
    place,
    ref,
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
def kernels(request):
    """Whatever FASTKD_BACKEND says, these tests are about the kernels: the C++ ones, unless a test asks for
    others.
    """
    backend = (
        request.node.callspec.params.get("backend", "cpp") if hasattr(request.node, "callspec") else "cpp"
    )
    if missing(backend):
        pytest.skip(f"backend {backend}: {missing(backend)}")
    with fastkd.use_backend(backend):
        yield


def gated(grad, y):
    """grad behind a ReLU of result y; y itself may be NaN, and then lets pass."""
    return torch.where(y <= 0, torch.zeros_like(grad), grad)


def strides(x):
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def check_tap(backend, function, x, residual=None, *, grad="contiguous", map_scale=1.0, **switches):
    """The function of that name under the backend against the reference: feature and map, and the gradient of
    both together.
    """
    relu = function == "relu_tap"
    plain = [x.detach(), *([] if residual is None else [residual.detach()])]
    inputs = [place(v, backend).detach().requires_grad_() for v in plain]
    map_grad = map_scale * torch.randn(x.shape[0], *x.shape[2:], dtype=F64)
    grad = None if grad is None else make(x.shape, x.dtype, grad)
    with fastkd.use_backend(backend), fused_only(backend=backend):
        y, attention = getattr(fastkd, function)(*inputs, **switches)
        sent = place(map_grad, backend).to(attention.dtype)
        outputs, grads = (
            ((attention,), (sent,)) if grad is None else ((y, attention), (place(grad, backend), sent))
        )
        got = [g.cpu() for g in torch.autograd.grad(outputs, inputs, grads)]
    y, attention = y.cpu(), attention.cpu()

    want = torch.relu(sum(plain[1:], start=plain[0])) if relu else plain[0]
    assert y.dtype == x.dtype and torch.equal(y.detach(), want)

    def exact_map(z):
        return ref.attention_map(z, **switches)

    def gradient(z, result):
        total = result.grads[0] if grad is None else result.grads[0] + grad.to(result.grads[0].dtype)
        return gated(total, z) if relu else total

    z = want.contiguous()
    wide = F64 if x.dtype == F64 else torch.float32
    exact, eager, moved = (
        evaluate(exact_map, [v], upstream=map_grad) for v in (z.double(), z.float(), nudged(z))
    )
    assert attention.dtype == wide
    error = eager_error(exact.output, (eager.output, moved.output), wide)
    within_budget(
        "map", attention.detach(), exact.output, error, terms=one_by_one(backend, plain, exact.output)
    )
    dx = gradient(z, exact)
    rough = [gradient(z, r) for r in (eager, moved)]
    terms = gradient(z, uncancelled(exact_map, [z], None, map_grad)).abs().max().item()
    for g in got:
        assert g.dtype == x.dtype
        within_budget(
            "gradient",
            g,
            dx,
            eager_error(dx, rough, wide),
            terms=TERM_ULPS * torch.finfo(wide).eps * terms + one_by_one(backend, plain, dx),
        )
    if torch.ops.aten.is_non_overlapping_and_dense(x):
        assert strides(y) == strides(got[0]) == strides(x)


# values and gradients


@pytest.mark.parametrize(
    "p, signed, channel_reduce", list(itertools.product(POWERS, [False, True], ["mean", "sum"]))
)
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_taps_match_the_reference_for_every_switch(backend, dtype, p, signed, channel_reduce):
    dtype = drawn(backend, dtype)
    switches = dict(
        p=p,
        signed=signed,
        channel_reduce=channel_reduce,
        eps_mode=random.choice(("clamp", "add")),
        eps=random.choice((1e-12, 0.5)),
    )
    shape = some_shape()
    kind = "positive" if signed and p != int(p) else "normal"
    check_tap(
        backend,
        "tap",
        make(shape, dtype, random.choice(LAYOUTS), kind),
        grad=random.choice((*LAYOUTS, None)),
        **switches,
    )
    residual = make(shape, dtype, random.choice(LAYOUTS)) if random.random() < 0.7 else None
    check_tap(
        backend,
        "relu_tap",
        make(shape, dtype, random.choice(LAYOUTS)),
        residual,
        grad=random.choice((*LAYOUTS, None)),
        **switches,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_taps_match_the_reference_in_every_layout(backend, shape, layout):
    shape = (1, 9, 40, 35) if backend == "triton" and shape == (1, 9, 80, 70) else shape
    for function in ("tap", "relu_tap"):
        check_tap(backend, function, make(shape, random.choice(dtypes(backend)), layout), grad=layout)
    dtype = random.choice(dtypes(backend))
    check_tap(backend, "relu_tap", make(shape, dtype, layout), make(shape, dtype, layout), grad=layout)


@pytest.mark.parametrize("grad", [*LAYOUTS, None])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("function", ["tap", "relu_tap"])
@pytest.mark.parametrize("backend", KERNELS)
def test_incoming_gradients_may_have_any_strides_or_be_missing(backend, function, layout, grad):
    for dtype in dtypes(backend):
        check_tap(backend, function, make((2, 19, 6, 7), dtype, layout), grad=grad, map_scale=100.0)


@pytest.mark.parametrize(
    "layouts", list(itertools.permutations(["contiguous", "channels_last", "stepped"], 2)), ids="-".join
)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_residual_may_lie_otherwise_than_the_feature(backend, layouts):
    for dtype in dtypes(backend):
        x, residual = (make((2, 19, 5, 9), dtype, layout) for layout in layouts)
        check_tap(backend, "relu_tap", x, residual, grad=random.choice(layouts))


@pytest.mark.parametrize("backend", KERNELS)
def test_energies_are_those_of_the_rounded_sum(backend):
    """256 + 0.9 is 256 in bfloat16: a map of the unrounded sum would tell the two positions apart."""
    x = torch.full((1, 1, 40), 256.0, dtype=torch.bfloat16)
    residual = torch.linspace(0, 0.9, 40).bfloat16().view(1, 1, 40)
    for layout in ("contiguous", "stepped"):
        y, attention = fastkd.relu_tap(
            place(arrange(x, layout), backend), place(arrange(residual, layout), backend)
        )
        assert (y == 256).all() and (attention == attention[0, 0]).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_relu_tap_treats_nan_and_infinity_as_relu_does(backend, dtype, layout):
    x = make((3, 17, 5, 4), dtype, layout)
    x[0, 3, 2, 1], x[1, 5, 0, 0], x[1, 2, 1, 1], x[2] = torch.nan, torch.inf, -torch.inf, x[2].abs()
    grad, map_grad = torch.randn_like(x), torch.randn(3, 5, 4)
    results = []
    for module, on in ((fastkd, backend), (ref, "cpp")):
        leaf = place(x.detach(), on).requires_grad_()
        y, attention = module.relu_tap(leaf)
        (dx,) = torch.autograd.grad(
            (y, attention), leaf, (place(grad, on), place(map_grad, on).to(attention.dtype))
        )
        results.append([v.detach().cpu() for v in (y, attention, dx)])
    for got, want in zip(*results):
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(
            got, want, equal_nan=True, rtol=2e-2 if dtype in DTYPES[:2] else 1e-4, atol=1e-2
        )


@pytest.mark.parametrize("function", ["tap", "relu_tap"])
@pytest.mark.parametrize("backend", KERNELS)
def test_zero_features_have_zero_maps_and_pass_the_gradient_on(backend, function):
    x = place(torch.zeros(2, 3, 4, 5), backend).requires_grad_()
    y, attention = getattr(fastkd, function)(x)
    grad = torch.randn_like(x)
    (dx,) = torch.autograd.grad((y, attention), x, (grad, torch.randn_like(attention)))
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
            seen.append(
                [v.detach() for v in (*outputs, *torch.autograd.grad(outputs, leaves, (grad, map_grad)))]
            )
    for other in seen[2:4], seen[4:]:
        assert all(torch.equal(a, b) for first, second in zip(seen[:2], other) for a, b in zip(first, second))


def test_relu_tap_makes_the_map_of_its_result_to_the_bit():
    """In place, both sum the same numbers in the same order, whatever the pieces."""
    for shape, layout in itertools.product(
        [(2, 33, 13, 13), (1, 300, 7, 9), (2, 5, 70, 70)], ["contiguous", "channels_last"]
    ):
        y, attention = fastkd.relu_tap(make(shape, torch.float32, layout))
        assert torch.equal(attention, fastkd.attention_map(y))


@pytest.mark.parametrize("path", native.CPU_PATHS)
def test_every_code_path_gives_the_same_answers(path):
    """The grid above runs on the path in force; here each is forced, in a process of its own."""
    if not native.CPU.available or path not in native.cpu_paths():
        pytest.skip(f"no {path} here: {native.CPU.reason}")
    code = """
import sys, torch, fastkd
torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(1)
for dtype, tolerance in dict(float16=1e-2, bfloat16=5e-2, float32=1e-5, float64=1e-12).items():
    dtype = getattr(torch, dtype)
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
                    absolute = tolerance * max(1, want.abs().max().item())
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=absolute)
"""
    env = {**os.environ, "FASTKD_CPU": path, "OMP_NUM_THREADS": "1", "FASTKD_BACKEND": "cpp"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(random.randrange(2**31))],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


# maps on the student's side of the loss


@pytest.mark.parametrize("difference", ["squared", "l2"])
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_loss_takes_maps_of_the_student(backend, dtype, difference):
    for other in dtypes(backend) if backend == "cpp" else (drawn(backend, None),):
        loss_over_maps_matches(backend, (dtype, other), difference)


def loss_over_maps_matches(backend, pair, difference):
    n = random.choice((1, 3))
    student = [
        make((n, *some_shape()[2:]), pair[0], random.choice(("contiguous", "reversed", "stepped")))
        for _ in range(2)
    ]
    teacher = [
        make((n, random.choice((1, 5, 19)), *s.shape[1:]), pair[1], random.choice((*DENSE, "stepped")))
        for s in student
    ]
    switches = dict(
        difference=difference,
        student_is_map=True,
        weights=[2.0, 0.5],
        weight=10.0,
        channel_reduce=random.choice(("mean", "sum")),
    )
    check_loss(backend, "attention_transfer_loss", student, teacher, **switches)
    check_loss(
        backend,
        "attention_transfer_loss",
        student,
        [ref.attention_map(t).to(t.dtype) for t in teacher],
        teacher_is_map=True,
        **switches,
    )


@pytest.mark.parametrize("pool, pool_mode", list(itertools.product(["before", "after"], ["avg", "max"])))
@pytest.mark.parametrize("backend", KERNELS)
def test_a_students_map_may_be_smaller_than_the_teacher(backend, pool, pool_mode):
    student, teacher = (
        make((3, 4, 5), random.choice(dtypes(backend))),
        make((3, 7, 9, 5), random.choice(dtypes(backend)), random.choice(LAYOUTS[:6])),
    )
    check_loss(
        backend,
        "attention_transfer_loss",
        [student],
        [teacher],
        student_is_map=True,
        pool=pool,
        pool_mode=pool_mode,
    )


def test_a_loss_over_tapped_maps_is_the_loss_over_features():
    s, t = ([make((4, c, n, n), F64) for c, n in ((3, 8), (5, 4))] for _ in range(2))

    def tapped(m, s, t):
        return m.attention_transfer_loss(
            [m.tap(x)[1] for x in s], [m.tap(x)[1] for x in t], student_is_map=True, teacher_is_map=True
        )

    want = evaluate(lambda *x: ref.attention_transfer_loss(x[:2], x[2:]), [*s, *t])
    for m in (fastkd, ref):
        got = evaluate(lambda *x: tapped(m, x[:2], x[2:]), [*s, *t])
        torch.testing.assert_close((got.output, got.grads), (want.output, want.grads), rtol=1e-9, atol=1e-12)
    module = fastkd.AttentionTransfer(student_is_map=True, weight=2.0)
    torch.testing.assert_close(module([fastkd.tap(x)[1] for x in s], t), 2 * want.output)
