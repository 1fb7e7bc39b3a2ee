"""Networks and their losses under torch.func, forward mode AD and batched gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from support import values
from torch import func
from torch.autograd import forward_ad
from transforms import BATCHED, compiled

import fastkd
from fastkd.models import create_model
from fastkd.ops.batch_norm import batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")


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
