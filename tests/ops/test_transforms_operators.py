"""The operators under torch.func, forward mode AD and batched gradients."""

from __future__ import annotations

import pytest
import torch
from support import values
from torch import func
from transforms import TRANSFORMS, agree, compiled, first, flat

from fastkd._bits import ATTENTION, FSP

pytestmark = pytest.mark.usefixtures("one_thread")
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
        made["rkd_pass"] = lambda x: ops.rkd_pass(x.flatten(1), b.flatten(1), 25.0, 50.0, True, False), a
        made["rkd_lengths"] = lambda x: ops.rkd_lengths(x.flatten(1)), a
        pairs = lambda x: x.flatten(1)[:, :2].double().contiguous()  # noqa: E731
        made["rkd_angles"] = lambda x: ops.rkd_angles(*[pairs(x), pairs(b)] * 2, True, False), a
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
        made["crd_pass"] = lambda x: ops.crd_pass(x.flatten(1), unit, *banks), a
        planes, square = b.contiguous(), torch.randn(2, 4, 8, 8)
        few = planes[:, :2].contiguous()
        made["ofd_loss"] = (lambda x: ops.ofd_loss([x.contiguous()], [planes], [-w], [1.0], True, False)), a
        made["hcl_loss"] = (lambda x: ops.hcl_loss([x.contiguous()], [square], [1.0], True, False)), -square
        sakd = [square], [1.0], True, False
        made["sakd_loss"] = (lambda x: ops.sakd_loss([x.contiguous()], *sakd)), -square
        made["pooled_map"] = lambda x: ops.pooled_map(x.contiguous()), a
        made["pooled_map_backward"] = (
            lambda x: ops.pooled_map_backward(None, torch.ones(2, 4), x.contiguous()),
            a,
        )
        made["norm_loss"] = ((lambda x: ops.norm_loss([x.contiguous()], [few], 2, True, False)), a)
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
    "rkd_angles": [0, 1, 2],
    "rkd_pass": [0, 1, 2],
    "crd_pass": [0, 1, 2, 3],
    "pooled_map": [0, 1],
}
PARTS = {
    "rkd_lengths": "rkd_loss",
    "rkd_angles": "rkd_loss",
    "rkd_pass": "rkd_loss",
    "crd_pass": "crd_loss",
    "pooled_map": "attention_map",
    "pooled_map_backward": "attention_map",
}  # of whose derivative an error speaks


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
            else f"fastkd.reference.{PARTS.get(operator, operator).removesuffix('_backward')}"
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
