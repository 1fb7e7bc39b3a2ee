"""fastkd.extract: the features of any module, and only of the forward pass that they belong to."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from plain_networks import Foreign
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastkd

NAMES = ["bn1", "layer1", "layer2.0.bn2", "layer3"]


class Twice(nn.Module):
    """A layer that is called twice and has two names, one that is never called, one that gives a tuple."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.lstm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)
        self.other = self.layer

    def forward(self, x):
        return self.lstm(self.layer(self.layer(x) + 1))[0]


def network(**options):
    torch.manual_seed(5)
    return Foreign(**options)


def by_hand(model, x):
    """The features of NAMES by the formula, nothing in place."""
    bn1 = model.bn1(model.conv1(x))
    x, found = bn1.relu(), {"bn1": bn1}
    for i, layer in enumerate((model.layer1, model.layer2, model.layer3), 1):
        block = layer[0]
        norm = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        x = (norm + (x if block.downsample is None else block.downsample(x))).relu()
        found[f"layer{i}.0.bn2"], found[f"layer{i}"] = norm, x
    return [found[name] for name in NAMES], model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("train", [True, False])
def test_features_are_as_they_left_their_modules_and_so_are_gradients(train):
    """bn1 is overwritten by a ReLU, layer2.0.bn2 by an addition; a second pass copies only those two."""
    model, other, x = network().train(train), network().train(train), torch.randn(2, 3, 16, 16)
    extractor = fastkd.extract(model, NAMES)
    for _ in range(2):
        features, logits = extractor(x)
        wanted, wanted_logits = by_hand(other, x)
        assert isinstance(features, list)
        torch.testing.assert_close([*features, logits], [*wanted, wanted_logits], rtol=1e-3, atol=1e-4)
        loss, exact = (
            sum(y.sin().sum() for y in [*ys, z]) for ys, z in ((features, logits), (wanted, wanted_logits))
        )
        found = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(
            found, torch.autograd.grad(exact, list(other.parameters())), rtol=1e-2, atol=1e-3
        )
    assert extractor._outputs.store.copied == {(train, True): {"names[0]", "names[2]"}}
    assert not extractor._outputs.store.found and not extractor._outputs.store.watched
    with torch.inference_mode():
        torch.testing.assert_close(extractor(x)[0], by_hand(other, x)[0], rtol=1e-3, atol=1e-4)


def test_modes_statistics_and_frozen_modules_are_left_alone():
    model = network()
    model.layer1.eval().requires_grad_(False)
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    extractor = fastkd.extract(model, NAMES)
    for _ in range(5):
        features, _ = extractor(torch.randn(2, 3, 16, 16))
    assert modes == [m.training for m in model.modules()] and extractor.training
    assert model.bn1.num_batches_tracked == 5 and model.layer2[0].bn2.num_batches_tracked == 5
    assert torch.equal(model.layer1[0].bn1.running_mean, before["layer1.0.bn1.running_mean"])
    sum(x.sum() for x in features).backward()
    assert model.layer1[0].conv1.weight.grad is None and model.conv1.weight.grad.any()
    assert fastkd.extract(network().eval(), NAMES).training is False


def test_of_a_module_called_twice_the_last_call_counts():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4)
    (first, second), _ = fastkd.extract(model, ["layer", "other"])(x)
    wanted = model.layer(model.layer(x) + 1)
    torch.testing.assert_close([first, second], [wanted, wanted])
    features, _ = fastkd.extract(model, [("lstm", lambda output: output[0]), ""])(x)
    assert torch.equal(features[0], features[1])


def test_it_is_one_graph():
    torch._dynamo.reset()
    x, found = torch.randn(2, 3, 16, 16), []
    for compiled in (False, True):
        model = network()
        extractor = fastkd.extract(model, NAMES)
        forward = torch.compile(extractor, fullgraph=True, backend="aot_eager") if compiled else extractor
        for train in (True, False, True):
            model.train(train)
            model.zero_grad()
            features, logits = forward(x)
            sum(y.sin().sum() for y in [*features, logits]).backward()
        found.append([features, logits, [p.grad for p in model.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_only_the_forward_pass_counts_under_checkpointing():
    """The recomputation calls the hooks once more."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, plain, x = Checkpointed(), network(), torch.randn(2, 3, 16, 16)
    extractor = fastkd.extract(model, [f"inner.{name}" for name in NAMES])
    results = []
    for one in (extractor, fastkd.extract(plain, NAMES)):
        features, logits = one(x)
        (sum(y.sin().sum() for y in features) + logits.sum()).backward()
        results.append([features, [p.grad for p in one.parameters()]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert not extractor._outputs.store.found


def test_a_copy_of_the_model_has_a_store_of_its_own():
    model = network().eval()
    extractor = fastkd.extract(model, NAMES)
    average = torch.optim.swa_utils.AveragedModel(model)
    clone = copy.deepcopy(extractor)
    x = torch.randn(2, 3, 16, 16)
    wanted = extractor(x)
    average(x + 1)
    with torch.no_grad():
        clone.model.fc.bias += 1
        clone.model.bn1.bias += 1
    assert not extractor._outputs.store.found and clone._outputs.network is clone.model
    assert not torch.equal(clone(x)[0][0], wanted[0][0])
    torch.testing.assert_close(extractor(x), wanted)
    again = pickle.loads(pickle.dumps(extractor))
    torch.testing.assert_close(again(x)[0], wanted[0])


def test_the_state_dict_has_the_models_names():
    model = network()
    extractor = fastkd.extract(model, NAMES)
    assert list(extractor.state_dict()) == list(model.state_dict()) == list(network().state_dict())
    outer = nn.Sequential(fastkd.extract(network(), NAMES))
    assert list(outer.state_dict()) == [f"0.{name}" for name in model.state_dict()]
    with torch.no_grad():
        model.fc.bias += 1
    assert (
        str(outer.load_state_dict({f"0.{k}": v for k, v in model.state_dict().items()}))
        == "<All keys matched successfully>"
    )
    assert torch.equal(outer[0].model.fc.bias, model.fc.bias)
    fresh = fastkd.extract(network(), NAMES)
    fresh.load_state_dict(extractor.state_dict())
    assert torch.equal(fresh.model.fc.bias, model.fc.bias)
    missing = fresh.load_state_dict({"fc.bias": model.fc.bias, "fc.bais": model.fc.bias}, strict=False)
    assert "fc.weight" in " ".join(missing.missing_keys) and "fc.bais" in " ".join(missing.unexpected_keys)


def test_under_autocast_and_in_double():
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = fastkd.extract(model, ["conv1", "layer1"])(torch.randn(2, 3, 16, 16))
    assert features[0].dtype == torch.bfloat16 and features[1].requires_grad
    features, _ = fastkd.extract(model.double(), NAMES)(torch.randn(2, 3, 16, 16).double())
    assert {x.dtype for x in features} == {torch.float64}


def test_distributed_data_parallel_around_it_and_inside(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    parallel = nn.parallel.DistributedDataParallel
    try:
        x, found = torch.randn(2, 3, 16, 16), []
        for way in ("none", "around", "inside"):
            model = network()
            names = [f"module.{name}" for name in NAMES] if way == "inside" else NAMES
            extractor = fastkd.extract(parallel(model) if way == "inside" else model, names)
            features, logits = (parallel(extractor) if way == "around" else extractor)(x)
            (sum(y.sin().sum() for y in features) + logits.sum()).backward()
            found.append([list(features), logits, [p.grad for p in model.parameters()]])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_hooks_go_with_their_extractor():
    model = network()
    extractor = fastkd.extract(model, NAMES)
    assert model.layer1._forward_hooks
    del extractor
    gc.collect()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_changes_only_later_is_an_error_once():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.on = nn.Linear(4, 4), False

        def forward(self, x):
            x = self.layer(x)
            return x.mul_(2) if self.on else x

    model, x = Sometimes(), torch.randn(2, 4)
    extractor = fastkd.extract(model, ["layer"])
    extractor(x)
    model.on = True
    with pytest.raises(RuntimeError, match=r"names\[0\]: changed in place after it was taken"):
        extractor(x)
    torch.testing.assert_close(extractor(x)[0][0], model.layer(x))


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (
            ["layer1", "layr2.0"],
            ValueError,
            "names: model has no submodule 'layr2.0', wanted one such as layer2.0",
        ),
        (["layer4"], ValueError, "names: model has no submodule 'layer4', wanted one such as layer"),
        ("layer1", TypeError, "names is 'layer1', wanted a list of names of submodules"),
        ([3], TypeError, r"names\[0\] is 3, wanted a name, or a pair of a name and a function"),
        ([("layer1", 3)], TypeError, r"names\[0\] is \('layer1', 3\), wanted a name, or a pair"),
    ],
)
def test_a_name_that_cannot_be_is_one_line(names, error, words):
    with pytest.raises(error, match=words) as caught:
        fastkd.extract(network(), names)
    assert "\n" not in str(caught.value)


def test_what_gives_no_tensor_or_does_not_run_is_one_line():
    x = torch.randn(3, 4)
    with pytest.raises(
        TypeError, match=r"names\[1\]: 'lstm' gives tuple, wanted a submodule that gives one tensor"
    ):
        fastkd.extract(Twice(), ["layer", "lstm"])(x)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"names\[1\] 'unused' did not run in this forward pass of Twice"
        ):
            fastkd.extract(Twice(), ["layer", "unused"])(x)
    with pytest.raises(TypeError, match=r"model is int, wanted a torch.nn.Module"):
        fastkd.extract(3, [])


def test_a_compiled_model_is_refused():
    for compiled in (torch.compile(network(), backend="eager"), network()):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        name = "_orig_mod.layer1" if hasattr(compiled, "_orig_mod") else "layer1"
        for names in ([name], ["layer1"]):
            with pytest.raises(ValueError, match="is compiled, where hooks stay silent"):
                fastkd.extract(compiled, names)
    part = network()
    part.layer1.compile(backend="eager")
    with pytest.raises(ValueError, match="names: its submodule 'layer1' is compiled"):
        fastkd.extract(part, ["layer1.0.bn1"])
    assert len(fastkd.extract(part, ["layer2"])(torch.randn(2, 3, 16, 16))[0]) == 1
