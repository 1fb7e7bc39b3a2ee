"""torch.func, forward mode AD and batched gradients: the right derivative, or one sentence that names the
reference; never a wrong number.

``auto`` takes plain PyTorch there, a backend by name refuses, and so do the operators themselves. A backward
pass that was recorded outside and is given several gradients at once answers them all.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support import KERNELS, place, ref, values
from torch import func
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import fastkd
from fastkd import native
from fastkd._bits import ATTENTION, FSP
from fastkd.models import create_model
from fastkd.ops.batch_norm import batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPES = ((2, 3, 4, 3), (2, 4, 4, 3), (2, 5, 4, 3))
compiled = pytest.mark.skipif(not native.CPU.available, reason="needs the CPU library")


def features(dtype=torch.float32):
    return [values(shape, dtype) for shape in SHAPES]


# name -> (module with the functions, student's stages, teacher's) -> scalar
CALLS = {
    "attention_map": lambda m, s, t: (m.attention_map(s[0], 1.5) * t[0].mean(1)).sum(),
    "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=100.0),
    "fsp_matrix": lambda m, s, t: m.fsp_matrix(s[0], s[1]).square().sum() + m.fsp_matrix(s[1], t[2]).sum(),
    "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
    "tap": lambda m, s, t: sum(((y * z).sum() + a[0].sum()) for (y, a), z in zip(map(m.tap, s), t)),
    "relu_tap": lambda m, s, t: sum(
        ((y * z).sum() + a[0].sum()) for (y, a), z in ((m.relu_tap(x, z), z) for x, z in zip(s, t))
    ),
}


def forward_mode(f, s):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*[forward_ad.make_dual(x, torch.ones_like(x)) for x in s])).tangent


TRANSFORMS = {  # name -> (scalar function of the stages, stages) -> what comes of it
    "forward mode AD": forward_mode,
    "jvp": lambda f, s: func.jvp(f, tuple(s), tuple(torch.ones_like(x) for x in s))[1],
    "grad": lambda f, s: func.grad(f, argnums=(0, 1))(*s),
    "vjp": lambda f, s: func.vjp(f, *s)[1](torch.tensor(2.0)),
    "vmap": lambda f, s: func.vmap(f)(*[torch.stack([x, 2 * x]) for x in s]),
    "nested vmap": lambda f, s: func.vmap(
        lambda x: func.vmap(lambda y: f(x, y, *s[2:]))(torch.stack([s[1], -s[1]]))
    )(torch.stack([s[0]] * 2)),
    "vmap of grad": lambda f, s: func.vmap(func.grad(f))(*[torch.stack([x, 2 * x]) for x in s]),
    "jacrev": lambda f, s: func.jacrev(f)(*s),
    "jacfwd": lambda f, s: func.jacfwd(f)(s[0][:1, :1], *[x[:1] for x in s[1:]]),
    "grad of grad": lambda f, s: func.grad(lambda x: func.grad(f)(x, *s[1:]).square().sum())(s[0]),
    "functionalize": lambda f, s: func.functionalize(f)(*s),
}


def flat(x):
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]


def agree(found, wanted, rtol=1e-4):
    for a, b in zip(flat(found), flat(wanted), strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=rtol * max(1e-3, b.abs().max().item()))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_inside_a_transform_is_the_references_or_refused_in_one_sentence(call, transform):
    s, t = features(), features()
    run = TRANSFORMS[transform]
    shapes = [
        x[:1, :1] if transform == "jacfwd" and i == 0 else x[:1] if transform == "jacfwd" else x
        for i, x in enumerate(t)
    ]
    wanted = run(lambda *s: CALLS[call](ref, list(s), shapes), s)
    with fastkd.use_backend("auto"):
        agree(run(lambda *s: CALLS[call](fastkd, list(s), shapes), s), wanted)
    if not native.CPU.available:
        return
    with fastkd.use_backend("cpp"), pytest.raises(fastkd.BackendError) as caught:
        run(lambda *s: CALLS[call](fastkd, list(s), shapes), s)
    assert f"fastkd.reference.{call}" in str(caught.value) and "\n" not in str(caught.value)


@compiled
@pytest.mark.parametrize("call", CALLS)
def test_a_named_backend_serves_tensors_without_tangents_beside_others(call):
    s, t = features(), features()
    with forward_ad.dual_level(), fastkd.use_backend("cpp"):
        forward_ad.make_dual(s[0].clone(), torch.ones_like(s[0]))
        agree(CALLS[call](fastkd, s, t), CALLS[call](ref, s, t))


# gradients of several outputs at once


def torchjd(losses, inputs):
    """What TorchJD does: a vmap over backward passes."""
    return func.vmap(lambda g: torch.autograd.grad(losses, inputs, g, retain_graph=True, allow_unused=True))(
        torch.eye(len(losses))
    )


BATCHED = {
    "is_grads_batched": lambda losses, inputs: torch.autograd.grad(
        losses, inputs, torch.eye(len(losses)), retain_graph=True, is_grads_batched=True
    ),
    "vmap over backward passes": torchjd,
}
ON = [
    pytest.param(backend.values[0], call, marks=backend.marks, id=f"{backend.id}-{call}")
    for backend in KERNELS
    for call in CALLS
    if (backend.values[0], call) != ("cuda", "attention_map")  # serves p = 2
]


@pytest.mark.parametrize("backend, call", ON)
def test_batched_gradients_answer_every_one(backend, call):
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (backend != "triton")]:  # which is interpreted
        s, t = ([place(x.requires_grad_(grad), backend) for x in features(dtype)] for grad in (True, False))
        for way in BATCHED.values():
            found = []
            for m in (fastkd, ref):
                with fastkd.use_backend(backend if m is fastkd else "auto"):
                    losses = torch.stack([CALLS[call](m, s, t), 3 * CALLS[call](m, s, t)])
                    used = [
                        x
                        for x, g in zip(
                            s, torch.autograd.grad(losses.sum(), s, retain_graph=True, allow_unused=True)
                        )
                        if g is not None
                    ]
                    found.append(way(losses, used))
            assert all(x.dtype == dtype for x in found[0])
            agree(*found, rtol=1e-4 if dtype == torch.float32 else 2e-2)


@compiled
@pytest.mark.parametrize("call", ["attention_transfer_loss", "fsp_loss"])
def test_a_batched_loss_scale_is_applied_before_halves_are_rounded(call):
    """With a factor of 1 most of these gradients are no numbers of float16."""
    s, t = (
        [(x * (1 + 3 * grad)).requires_grad_(grad) for x in features(torch.float16)] for grad in (True, False)
    )
    grads = torch.tensor([2.0**14, 2.0**16])
    found = []
    for m, backend in ((fastkd, "cpp"), (ref, "auto")):
        with fastkd.use_backend(backend):
            loss = getattr(m, call)(s, t, weight=1e-6)
        found.append(torch.autograd.grad(loss, s, grads, is_grads_batched=True))
    for a, b in zip(*found, strict=True):
        assert b.abs().max() < 0.5 and ((a == 0) == (b == 0)).double().mean() > 0.95
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("call", CALLS)
def test_a_vectorized_jacobian_is_the_references(call, strategy):
    s, t = features(), features()
    with fastkd.use_backend("auto"):
        found, wanted = (
            jacobian(lambda x: CALLS[call](m, [x, *s[1:]], t), s[0], vectorize=True, strategy=strategy)
            for m in (fastkd, ref)
        )
    agree(found, wanted)


@compiled
@pytest.mark.parametrize("call", CALLS)
def test_a_second_derivative_of_a_batched_gradient_is_right_or_refused(call):
    s, t = ([x.requires_grad_(grad) for x in features(torch.float64)] for grad in (True, False))

    def second(m):
        losses = torch.stack([CALLS[call](m, s, t), 3 * CALLS[call](m, s, t)])
        (first,) = torch.autograd.grad(
            losses, s[:1], torch.eye(2, dtype=torch.float64), is_grads_batched=True, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), s[0])[0]

    wanted = second(ref)
    try:
        with fastkd.use_backend("cpp"):
            agree(second(fastkd), wanted)
    except RuntimeError as refused:
        assert f"fastkd.reference.{call}" in str(refused)


# the operators, called directly

MAP = (2.0, "mean", False, 1e-12, "clamp")
NORMED = (2.0, "mean", False, True, 1e-12, "clamp")
BOTH = ATTENTION.pack(channel_reduce="mean", pool="before", student_grad=True, teacher_grad=True)


def operators(ops):
    """name -> (function of one tensor, that tensor), for every operator of a namespace."""
    a, b, c, d = (values((2, 4, 5, 3), torch.float32).to(memory_format=torch.channels_last) for _ in range(4))
    w = torch.rand(4)
    m, norm = ops.attention_map(a, *NORMED)
    y, map_y, norm_y = ops.relu_tap(a, b, *MAP)
    transfer = (BOTH, [0.0, 2.0, 1e-12, 1.0])
    loss, coefficients, _ = ops.attention_transfer_loss([a, b], [c, d], *transfer)
    chain = (FSP.pack(with_grad=True), [0.0, 1.0])
    fsp, matrix_grads, _ = ops.fsp_loss([a, b], [c, d], *chain)
    made = {
        "attention_map": (lambda x: ops.attention_map(x, *NORMED), a),
        "attention_map_backward": (lambda x: ops.attention_map_backward(map_y, x, m, norm, *NORMED), a),
        "attention_transfer_loss": (lambda x: ops.attention_transfer_loss([x, b], [c, d], *transfer), a),
        "attention_transfer_loss_backward": (
            lambda x: ops.attention_transfer_loss_backward(loss, [x, b], coefficients[:2], 2.0, BOTH),
            a,
        ),
        "fsp_matrix": (lambda x: ops.fsp_matrix(x, b, 0), a),
        "fsp_matrix_backward": (
            lambda x: ops.fsp_matrix_backward(matrix_grads[0], x, b, FSP.pack(a_grad=True, b_grad=True)),
            a,
        ),
        "fsp_loss": (lambda x: ops.fsp_loss([x, b], [c, d], *chain), a),
        "fsp_loss_backward": (lambda x: ops.fsp_loss_backward(fsp, [x, b], matrix_grads, 0, [0, 1], []), a),
        "tap_backward": (lambda x: ops.tap_backward(b, map_y, x, m, norm, *MAP), a),
        "relu_tap": (lambda x: ops.relu_tap(x, b, *MAP), a),
        "relu_tap_backward": (lambda x: ops.relu_tap_backward(b, map_y, x, map_y, norm_y, *MAP), y),
    }
    if ops is torch.ops.fastkd:
        _, mean, _, invstd = ops.batch_norm(a, b, w, w, True, 1e-5)
        made["batch_norm"] = lambda x: ops.batch_norm(x, b, w, w, True, 1e-5), a
        made["batch_norm_backward"] = (
            lambda x: ops.batch_norm_backward(b, x, None, w, w, mean, invstd, True, False),
            a,
        )
        made["rkd_loss"] = lambda x: ops.rkd_loss(x.flatten(1), b.flatten(1), 25.0, 50.0, True, False), a
        unit, rows = (
            b.flatten(1) / b.flatten(1).norm(dim=1, keepdim=True),
            torch.tensor([[0, 2, 1], [1, 0, 3]]),
        )
        banks = (
            torch.randn(4, 60),
            torch.randn(4, 60),
            rows,
            torch.tensor([5.0, 7.0]),
            50.0,
            1e-7,
            1.0,
            True,
            False,
        )
        made["crd_loss"] = lambda x: ops.crd_loss(x.flatten(1), unit, *banks), a
        made["add_relu_"] = lambda x: ops.add_relu_(x * 1, b), a
    return made


BARRIER = "fastkd::recompute_barrier_"  # it computes and returns nothing
NAMES = {
    namespace: sorted(
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{namespace}::") and name != BARRIER
    )
    for namespace in ("fastkd", "fastkd_cuda")
}
every_operator = pytest.mark.parametrize(
    "namespace, operator", [(space, name) for space, names in NAMES.items() for name in names]
)
DIFFERENTIABLE = {  # of several outputs, those that have a derivative
    "attention_map": [0],
    "attention_transfer_loss": [0],
    "fsp_loss": [0],
    "relu_tap": [0, 1],
    "batch_norm": [0],
}


def first(output):
    return flat(output)[0]


@compiled
@every_operator
def test_no_operator_drops_a_derivative(namespace, operator):
    f, x = operators(getattr(torch.ops, namespace))[operator]
    for way in ("forward mode AD", "jvp", "vjp", "grad"):
        run = (lambda f, s: func.grad(f)(*s)) if way == "grad" else TRANSFORMS[way]
        with pytest.raises(RuntimeError) as caught:
            run(lambda x: first(f(x)).sum(), [x])
        instead = (
            "torch.relu"
            if operator == "add_relu_"
            else f"fastkd.reference.{operator.removesuffix('_backward')}"
        )
        assert f"{namespace}::{operator}" in str(caught.value) and instead in str(caught.value), caught.value
        assert "\n" not in str(caught.value)


@compiled
@every_operator
def test_outputs_that_have_no_derivative_say_so(namespace, operator):
    f, x = operators(getattr(torch.ops, namespace))[operator]
    x = x.clone().requires_grad_()
    if operator == "add_relu_":
        with pytest.raises(RuntimeError, match="no derivative"):
            f(x)
        return
    outputs = flat(f(x))
    if operator.endswith("_backward"):
        assert all(y.requires_grad for y in outputs if y.numel())  # a second derivative, which is refused
        return
    assert [i for i, y in enumerate(outputs) if y.requires_grad] == DIFFERENTIABLE.get(operator, [0])


@compiled
@every_operator
def test_an_operator_under_vmap_runs_once_a_sample(namespace, operator):
    f, x = operators(getattr(torch.ops, namespace))[operator]
    samples = [x, 2 * x, x.flip(0).contiguous(memory_format=torch.channels_last)]
    if operator == "add_relu_":
        with pytest.raises(RuntimeError, match="no rule for vmap; use torch.relu"):
            func.vmap(f)(torch.stack(samples))
        return
    wanted = [torch.stack(same) for same in zip(*(flat(f(y)) for y in samples))]
    dims = (0,) if "norm" in operator else (0, 1)  # a batch norm wants samples that are dense
    for found in (func.vmap(f, dim)(torch.stack(samples, dim)) for dim in dims):
        for a, b in zip(flat(found), wanted, strict=True):
            assert torch.equal(a, b)
    twice = func.vmap(
        lambda factor: func.vmap(lambda x: f((x * factor).contiguous()) if "norm" not in operator else f(x))(
            torch.stack(samples)
        )
    )(torch.ones(2))
    assert all(
        torch.allclose(a[1], b, rtol=1e-4, atol=1e-6) for a, b in zip(flat(twice), wanted, strict=True)
    )


@compiled
@pytest.mark.parametrize(
    "operator",
    ["attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss", "relu_tap", "batch_norm"],
)
def test_an_operators_gradients_may_be_batched(operator):
    f, x = operators(torch.ops.fastkd)[operator]
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = first(f(x))
    grads = torch.randn(3, *y.shape)
    wanted = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads])
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True)
    agree(found, wanted)


@compiled
def test_the_addition_in_place_counts_as_a_change():
    x = values((2, 4, 5, 3), torch.float32).to(memory_format=torch.channels_last)
    before = x._version
    torch.ops.fastkd.add_relu_(x, None)
    assert x._version > before
    y = values((2, 4, 5, 3), torch.float32).to(memory_format=torch.channels_last).requires_grad_() * 1
    square = y.square()
    with torch.no_grad():
        torch.ops.fastkd.add_relu_(y, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


# networks


def network(name, train=False, layout=torch.channels_last):
    torch.manual_seed(11)
    return create_model(name).train(train).to(memory_format=layout), torch.randn(3, 3, 16, 16).to(
        memory_format=layout
    )


def total(model, images, teacher, state):
    features, logits = func.functional_call(
        model, {n: x.clone() for n, x in state.items()}, (images,), {"features": True}
    )
    return (
        logits.square().mean()
        + fastkd.attention_transfer_loss(features.stages, teacher)
        + fastkd.fsp_loss(features.stages, teacher)
    )


NETWORKS = pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])


@NETWORKS
@pytest.mark.parametrize("backend", ["auto", pytest.param("cpp", marks=compiled)])
@pytest.mark.parametrize(
    "layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "planes"]
)
def test_forward_mode_goes_through_a_network_without_gradients(name, layout, backend):
    model, images = network(name, layout=layout)
    direction = torch.randn_like(images)
    eps = 1e-7
    with torch.no_grad():
        double, wide, step = copy.deepcopy(model).double(), images.double(), eps * direction.double()
        wanted = (double(wide + step) - double(wide - step)) / (2 * eps)
        with fastkd.use_backend(backend):
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(model(forward_ad.make_dual(images, direction))).tangent
            also = func.jvp(model, (images,), (direction,))[1]
    for tangent in (found, also):
        torch.testing.assert_close(tangent.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@NETWORKS
@pytest.mark.parametrize("train", [False, True])
def test_transforms_go_through_networks_and_losses(name, train):
    """grad, vjp, jvp over the parameters of a network with its losses, against the fused operations and
    autograd.
    """
    model, images = network(name, train)
    params = {n: x.detach() for n, x in model.named_parameters()}
    buffers = {n: x.detach().clone() for n, x in model.named_buffers()}
    with fastkd.use_backend("auto"):
        teacher = [x.detach() * 2 for x in copy.deepcopy(model)(images, features=True)[0].stages]

        def loss(p):
            return total(model, images, teacher, {**p, **buffers})

        leaves = {n: x.clone().requires_grad_() for n, x in params.items()}
        wanted = dict(
            zip(
                leaves,
                torch.autograd.grad(
                    total(copy.deepcopy(model), images, teacher, {**leaves, **buffers}), leaves.values()
                ),
            )
        )
        found = func.grad(loss)(params)
        pulled = func.vjp(loss, params)[1](torch.tensor(2.0))[0]
        pushed = func.jvp(loss, (params,), (params,))[1]
    for key, want in wanted.items():
        size = 1e-3 * want.norm() + 1e-6
        assert (found[key] - want).norm() < 10 * size and (pulled[key] / 2 - want).norm() < 10 * size, key
    inner = sum((params[key] * want).sum() for key, want in wanted.items())
    # PyTorch 2.14 makes the tangent of a scalar times a Python number float64
    torch.testing.assert_close(pushed.to(inner.dtype), inner, rtol=1e-2, atol=1e-3)


@NETWORKS
@pytest.mark.parametrize("train", [False, True])
def test_ensembles_by_stack_module_state(name, train):
    model, images = network(name, train)
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for x in models[1].parameters():
            x.mul_(1.1)
    params, buffers = func.stack_module_state(models)
    params = {n: x.detach() for n, x in params.items()}
    base = copy.deepcopy(model)
    with fastkd.use_backend("auto"):
        teacher = [x.detach() * 2 for x in copy.deepcopy(model)(images, features=True)[0].stages]

        def loss(p, b):
            return total(base, images, teacher, {**p, **b})

        values = func.vmap(loss)(params, buffers)
        grads = func.vmap(func.grad(loss))(params, buffers)
        for i, one in enumerate(models):
            want = total(one, images, teacher, dict(one.named_buffers()))
            torch.testing.assert_close(values[i], want.detach(), rtol=1e-3, atol=1e-4)
            want.backward()
            for key, x in one.named_parameters():
                assert (grads[key][i] - x.grad).norm() < 1e-2 * x.grad.norm() + 1e-5, key


@NETWORKS
def test_one_batched_parameter_is_enough(name):
    """vmap over the weights of one shortcut: what it adds is batched, what it is added to is not."""
    model, images = network(name)
    state = {n: x.detach() for n, x in (*model.named_parameters(), *model.named_buffers())}
    key = [n for n in state if "downsample.0" in n or "convShortcut" in n][-1]
    stack = torch.stack([state[key], 2 * state[key]])
    found = func.vmap(lambda w: func.functional_call(model, {**state, key: w}, (images,)))(stack)
    for out, w in zip(found, stack):
        torch.testing.assert_close(
            out, func.functional_call(model, {**state, key: w}, (images,)).detach(), rtol=1e-4, atol=1e-4
        )


@NETWORKS
@pytest.mark.parametrize("train", [False, True])
def test_batched_gradients_of_a_networks_losses(name, train):
    """TorchJD's pattern: one row of the Jacobian a loss, through the fused batch norms where they train."""
    model, images = network(name, train)
    with fastkd.use_backend("auto"):
        teacher = [x.detach() * 2 for x in copy.deepcopy(model)(images, features=True)[0].stages]
        features, logits = model(images, features=True)
        losses = torch.stack(
            [
                logits.square().mean(),
                fastkd.attention_transfer_loss(features.stages, teacher),
                fastkd.fsp_loss(features.stages, teacher),
            ]
        )
        params = [x for n, x in model.named_parameters() if not n.startswith("fc")]
        wanted = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        for way in BATCHED.values():
            for grads, *each in zip(way(losses, params), *wanted, strict=True):
                for row, want in zip(grads, each, strict=True):
                    assert (row - want).norm() < 1e-2 * want.norm() + 1e-5


@compiled
def test_a_batched_gradient_for_the_residual_alone():
    x, residual, frozen = (
        values((4, 5, 3, 3), torch.float32).to(memory_format=torch.channels_last) for _ in range(3)
    )
    norm = torch.nn.BatchNorm2d(5).requires_grad_(False)
    residual.requires_grad_()
    with fastkd.use_backend("cpp"):
        y = batch_norm(norm, x, residual, relu=True)
    grads = torch.stack([frozen, 2 * frozen])
    (found,) = torch.autograd.grad(y, residual, grads, is_grads_batched=True)
    assert torch.equal(found, grads * (y > 0))
