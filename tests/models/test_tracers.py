"""The networks under tracers, folded, and as other libraries take them apart."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
from module_cases import halve, images, modes, network, networks
from recorder import Recorder
from torch.fx.experimental.proxy_tensor import make_fx

from fastkd.models.folding import fold_for_inference


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
def test_torchvisions_feature_extractor_traces_the_networks(name, train, torchvision):
    from torchvision.models import feature_extraction as extraction

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
