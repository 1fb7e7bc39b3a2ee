"""The networks as other libraries use them: hooks, replaced modules, forwards of an instance's own,
parametrizations and tracers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re

import pytest
import torch
from recorder import Recorder
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as modules
from torch.nn.utils import parametrizations, parametrize

import fastkd
from fastkd import native
from fastkd.models import create_model
from fastkd.models.folding import fold_for_inference

NETWORKS = ["resnet8", "wrn_16_1"]
networks = pytest.mark.parametrize("name", NETWORKS)
modes = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def by_the_kernels():
    """Whatever FASTKD_BACKEND says: the question is when they step aside."""
    with fastkd.use_backend("auto"):
        yield


def images(n=2):
    return torch.randn(n, 3, 16, 16).to(memory_format=torch.channels_last)


def network(name, train=True):
    """In channels_last, so that the fused batch norm would serve it, with norms that change what passes
    through them.
    """
    model = create_model(name).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.train(train)


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


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halve(model, key):
    module = model.get_submodule(key)
    parametrize.register_parametrization(module, "weight", Halved())
    return model


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


@networks
@pytest.mark.parametrize("what", ["conv", "norm"])
@pytest.mark.parametrize("how", ["hook", "forward", "parametrization", "heir"])
def test_a_folded_teacher_calls_what_was_put_on_its_modules(name, what, how):
    teacher, x = network(name, train=False), images()
    key = {
        "resnet8": {"conv": "layer1.0.conv1", "norm": "layer1.0.bn1"},
        "wrn_16_1": {"conv": "block1.layer.0.conv1", "norm": "block1.layer.0.bn2"},
    }[name][what]
    module = teacher.get_submodule(key)
    if how == "hook":
        module.register_forward_hook(lambda module, args, output: output * 2 + 1)
    elif how == "forward":
        own = type(module).forward
        module.forward = lambda x, own=own, module=module: own(module, x) * 2 + 1
    elif how == "parametrization":
        halve(teacher, key)
    else:
        module.__class__ = type(
            "Heir", (type(module),), {"forward": lambda self, x: super(type(self), self).forward(x) * 2 + 1}
        )
    with torch.no_grad():
        torch.testing.assert_close(fold_for_inference(teacher, False)(x), teacher(x), rtol=1e-4, atol=1e-4)


def folded(model):
    return fold_for_inference(model.eval(), False)


TRACERS = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, fake": lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "make_fx, symbolic": lambda model, x: make_fx(
        model, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x),
    "make_fx, pre_dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    "functionalize": lambda model, x: make_fx(torch.func.functionalize(model))(x),
    "functionalize alone": lambda model, x: torch.func.functionalize(model),
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "export, strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


@pytest.mark.parametrize(
    ("name", "kind"), [("resnet8", "train"), ("resnet8", "folded"), ("wrn_16_1", "eval")]
)
@pytest.mark.parametrize("tracer", TRACERS)
def test_under_a_tracer_networks_are_plain_pytorch(name, kind, tracer):
    model, x = network(name, train=kind == "train"), images()
    if kind == "folded":
        model = fold_for_inference(model.eval(), False)
    plain, other = copy.deepcopy(model), images()
    with torch.set_grad_enabled(kind == "train"):
        program = TRACERS[tracer](model, x)
        code = str(getattr(program, "inlined_graph", getattr(program, "graph", "")))
        assert not re.search(r"fastkd::|ops\.fastkd|BatchNormFunction", code)
        # a dispatch mode cannot run a traced script that compares sizes
        with Recorder() if tracer != "jit.trace" else contextlib.nullcontext(Recorder()) as recorder:
            found = program(other)
        assert not recorder.fused
        torch.testing.assert_close(found, plain(other), rtol=1e-4, atol=1e-4)


@networks
def test_a_traced_network_has_the_arguments_it_was_traced_with(name):
    model, x = network(name, train=False), images()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(AssertionError, match="traced with features=False"):
        traced(x, features=True)
    shown = torch.fx.symbolic_trace(model, concrete_args={"features": True})
    found, wanted = shown(x, True, None), model(x, features=True)
    torch.testing.assert_close(found[0].stages, wanted[0].stages)
    torch.testing.assert_close(found[1], wanted[1])


@networks
@modes
def test_torchvisions_feature_extractor_traces_the_networks(name, train):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = network(name, train), images()
    if name == "resnet8":
        nodes = ["layer1", "layer2", "layer3", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.downsample.1"]
    else:
        nodes = ["block1", "block2", "block3", "block1.layer.0.bn1", "block1.layer.0.conv2", "bn1"]
    extractor = extraction.create_feature_extractor(model, nodes)
    kept, wanted = {}, copy.deepcopy(model)
    for node in nodes:
        wanted.get_submodule(node).register_forward_hook(
            lambda module, args, output, node=node: kept.__setitem__(node, output.clone())
        )
    wanted(x)
    for node, output in extractor(x).items():
        torch.testing.assert_close(output, kept[node], rtol=1e-4, atol=1e-5)
