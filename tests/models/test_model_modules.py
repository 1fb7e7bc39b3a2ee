"""The networks as other libraries use them: hooks, replaced modules, forwards of an instance's own,
parametrizations and tracers.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from module_cases import halve, images, modes, network, networks
from recorder import Recorder
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations

import fastkd
from fastkd import native


@pytest.fixture(autouse=True)
def by_the_kernels():
    """Whatever FASTKD_BACKEND says: the question is when they step aside."""
    with fastkd.use_backend("auto"):
        yield


def ask(model, x, features):
    """The tensors that a call returns; ``features`` may be "tap"."""
    if features == "tap":
        found, logits = model(
            x, features=True, tap=fastkd.relu_tap if hasattr(model, "layer1") else fastkd.tap
        )
    elif features:
        found, logits = model(x, features=features)
    else:
        return [model(x)]
    return [found.stem, *found.stages, found.pooled, *found.blocks, *found.maps, logits]


@networks
@modes
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("features", [False, True, "preact", "tap"])
def test_hooks_fire_once_on_every_module_and_hold_what_it_returned(name, train, grad, features):
    model, x = network(name, train), images()
    plain = copy.deepcopy(model)
    seen, copies = {}, {}

    def hook(module, args, output, name):
        assert name not in seen and isinstance(output, torch.Tensor) and len(args) == 1
        seen[name], copies[name] = output, output.detach().clone()

    for key, module in model.named_modules():
        if key:
            module.register_forward_hook(functools.partial(hook, name=key))
    with torch.set_grad_enabled(grad):
        found, wanted = ask(model, x, features), ask(plain, x, features)
    assert set(seen) == {key for key, _ in model.named_modules()} - {""}
    for key, output in seen.items():
        assert torch.equal(output, copies[key]), f"{key}: overwritten after its hook"
    for ours, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    for ours, want in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)
    if features is True:
        groups = [key for key in seen if key in ("layer1", "layer2", "layer3", "block1", "block2", "block3")]
        assert all(seen[key] is stage for key, stage in zip(groups, found[1:4], strict=True))


@networks
def test_what_a_hook_returns_goes_on(name):
    model, x = network(name, train=False), images()
    group = model.layer2 if name == "resnet8" else model.block2
    group.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    found, _ = model(x, features=True)
    assert not found.stages[1].any() and found.stages[0].any()
    changed = model(x)
    assert torch.equal(changed[0], changed[1])  # nothing of the images is left


@networks
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_of_all_modules_are_called(name, kind):
    model, seen = network(name), []
    handle = getattr(modules, f"register_module_{kind}")(lambda module, *rest: seen.append(module))
    try:
        model(images()).sum().backward()
    finally:
        handle.remove()
    assert {id(module) for module in seen} >= {
        id(module) for module in model.modules() if module is not model
    }
    with Recorder() as recorder:  # and once they are gone the fused operator is back
        model(images())
    assert ("batch_norm" in recorder.fused) == native.CPU.available


def kinds(model):
    """A module of each kind and place, by name."""
    places = {}
    for key, module in model.named_modules():
        if key:
            places.setdefault((type(module), key.rpartition(".")[2]), key)
    return list(places.values())


@networks
@modes
def test_a_forward_of_the_instances_own_is_called(name, train):
    """As accelerate's hooks and cpu_offload set it."""
    for key in kinds(network(name)):
        model, x = network(name, train), images()
        module, calls = model.get_submodule(key), []
        own = module.forward

        def forward(*args, own=own, calls=calls, **kwargs):
            calls.append(1)
            return own(*args, **kwargs) * 0 + 0.5

        module.forward = forward
        with torch.no_grad():
            logits = model(x)
            _, again = model(x, features=True)
        assert len(calls) == 2, key
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
        if not key.startswith(("layer", "block")) or key in ("layer3", "block3"):
            torch.testing.assert_close(logits[0], logits[1])


def test_a_compiled_block_calls_a_forward_of_the_instances_own():
    block = network("resnet8").layer1[0]
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    other = copy.deepcopy(block)
    own = block.bn2.forward
    block.bn2.forward = lambda x: own(x) * 2 + 1
    wanted = copy.deepcopy(block)(x)
    assert not torch.allclose(other(x), wanted, atol=1e-2)
    torch.testing.assert_close(
        torch.compile(block, fullgraph=True, backend="aot_eager")(x), wanted, rtol=1e-4, atol=1e-4
    )


@networks
@modes
def test_parametrizations_and_subclasses_are_called(name, train):
    x = images()
    for key in kinds(network(name)):
        model = network(name, train)
        module = model.get_submodule(key)
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        by_hand = copy.deepcopy(model)
        with torch.no_grad():
            by_hand.get_submodule(key).weight.div_(2)
        torch.testing.assert_close(halve(model, key)(x), by_hand(x), rtol=1e-4, atol=1e-4)
        calls, kind = [], type(by_hand.get_submodule(key))
        forward = {
            "forward": lambda self, x, kind=kind, calls=calls: (calls.append(1), kind.forward(self, x))[1]
        }
        by_hand.get_submodule(key).__class__ = type("Heir", (kind,), forward)
        by_hand(x)
        assert len(calls) == 1, key


def test_weight_norm_and_spectral_norm_train():
    model = network("resnet8")
    parametrizations.weight_norm(model.layer1[0].conv2)
    parametrizations.spectral_norm(model.layer2[0].downsample[0])
    parametrizations.spectral_norm(model.fc)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Through(nn.Module):
    """Returns its input, and holds it."""

    def forward(self, x):
        self.held, self.copy = x, x.detach().clone()
        return x


class Held(Through):
    """Holds what the module in it returned."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return super().forward(self.module(x))


@networks
@modes
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", ["Through", "Held", "Identity"])
@pytest.mark.parametrize("features", [False, True, "preact", "tap"])
def test_nothing_that_another_module_returned_is_overwritten(name, train, grad, kind, features):
    model, x = network(name, train), images()
    for key, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            made = {"Through": Through, "Identity": nn.Identity, "Held": lambda m=module: Held(m)}[kind]()
        elif isinstance(module, nn.Conv2d) and kind != "Through":
            made = Held(module)
        else:
            continue
        model.set_submodule(key, made)
    apart = copy.deepcopy(model).to(memory_format=torch.contiguous_format).double()
    with torch.set_grad_enabled(grad):
        found = ask(model, x, features)
    for module in model.modules():
        if isinstance(module, Through):
            assert torch.equal(module.held, module.copy)
    wanted = ask(apart, x.double(), features)
    for ours, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
