"""tap and relu_tap: C++ and Triton kernels against the reference in float64, over dtypes, layouts, shapes,
switches; losses over maps.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from recorder import fused_only
from support import (
    DTYPES,
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    TERM_ULPS,
    arrange,
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

F64 = torch.float64

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
def test_powers_are_those_of_the_rounded_sum(backend):
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
