"""Checkpoints as people have them: what lies beside the weights, where the weights are, and under which
names.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoint_cases import network, same, save
from torch import nn

from fastkd.models import WeightsError, create_model, load_weights
from fastkd.models.weights import KEYS


@pytest.fixture(scope="module")
def source():
    return network()


@pytest.mark.parametrize("key", KEYS)
def test_weights_load_under_each_key(tmp_path, source, key):
    assert KEYS == ("model", "state_dict", "net", "model_state_dict", "student", "ema")
    target, said = create_model("resnet8", 10), []
    load_weights(target, save({"epoch": 1, key: source.state_dict()}, tmp_path / "w.pth"), say=said.append)
    assert same(target, source) and len(said) == (key == "ema")


def test_of_several_weights_the_first_is_taken_and_said(tmp_path, source):
    other = create_model("resnet8", 10).state_dict()
    path = save({"ema": other, "model": "resnet8", "net": source.state_dict()}, tmp_path / "w.pth")
    target = create_model("resnet8", 10)
    with pytest.warns(UserWarning, match=r"w\.pth: took the weights under 'net'; it has others under 'ema'"):
        load_weights(target, path)
    assert same(target, source)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_are_dropped(tmp_path, source, prefix):
    target = create_model("resnet8", 10)
    load_weights(
        target,
        save({prefix + name: value for name, value in source.state_dict().items()}, tmp_path / "w.pth"),
    )
    assert same(target, source)


def test_parts_that_were_compiled_alone_and_averaged_models_load(tmp_path, source):
    whole = copy.deepcopy(source)
    whole.layer1 = torch.compile(whole.layer1)
    assert any("layer1._orig_mod.0" in name for name in whole.state_dict())
    for model in (whole, nn.DataParallel(source), torch.optim.swa_utils.AveragedModel(source)):
        target = create_model("resnet8", 10)
        load_weights(target, save(model.state_dict(), tmp_path / "w.pth"))
        assert same(target, source)


def test_a_models_own_module_keeps_its_name(tmp_path):
    source, target = (nn.ModuleDict({"module": nn.Linear(2, 3)}) for _ in range(2))
    load_weights(target, save(source.state_dict(), tmp_path / "w.pth"))
    assert same(target, source)
    load_weights(
        target,
        save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "w.pth"),
    )
    assert same(target, source)


def test_a_profilers_counters_are_left_out(tmp_path, source):
    state = source.state_dict()
    for name, _ in source.named_modules():
        dot = f"{name}." if name else ""
        state[f"{dot}total_ops"], state[f"{dot}total_params"] = torch.zeros(1), torch.zeros(1)
    target = create_model("resnet8", 10)
    load_weights(target, save(state, tmp_path / "w.pth"))
    assert same(target, source)


def test_a_classifier_may_have_no_bias(tmp_path, source):
    bare, target = copy.deepcopy(source), create_model("resnet8", 10)
    bare.fc, target.fc = nn.Linear(64, 10, bias=False), nn.Linear(64, 10, bias=False)
    path = save(bare.state_dict(), tmp_path / "w.pth")
    load_weights(target, path)
    assert same(target, bare)
    with pytest.raises(WeightsError, match=r"it lacks 1 name \(fc\.bias\)$"):
        load_weights(create_model("resnet8", 10), path)
    with pytest.raises(WeightsError, match=r"it has 1 name \(fc\.bias\) that the model has not$"):
        load_weights(target, save(source.state_dict(), path))
    target.fc = nn.Linear(64, 100, bias=False)
    with pytest.raises(WeightsError, match="trained for 10 classes, wanted 100"):
        load_weights(target, save(bare.state_dict(), path))


def test_the_nearest_name_is_told(tmp_path, source):
    state = {
        name.replace("layer2.0.bn1", "layer2.0.norm1").replace("fc.", "linear."): v
        for name, v in source.state_dict().items()
    }
    with pytest.raises(WeightsError) as caught:
        load_weights(create_model("resnet8", 10), save(state, tmp_path / "w.pth"))
    assert str(caught.value).endswith(
        "w.pth: another layout than the model's: it lacks 6 names (layer2.0.bn1.weight, nearest on the other"
        " side layer2.0.norm1.weight) and has 7 names (layer2.0.norm1.weight, nearest on the other side"
        " layer2.0.bn1.weight) that the model has not"
    )


def test_a_weight_that_is_there_twice_is_told(tmp_path, source):
    state = source.state_dict()
    with pytest.raises(WeightsError, match=r"holds fc\.bias twice, the second time as module\.fc\.bias"):
        load_weights(
            create_model("resnet8", 10),
            save({**state, "module.fc.bias": state["fc.bias"]}, tmp_path / "w.pth"),
        )
