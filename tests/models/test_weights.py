"""Weights from files: what fits is loaded, what does not is told in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from fastkd.models import WeightsError, create_model, load_weights


@pytest.mark.parametrize("form", ["bare", "model", "DataParallel", "before 0.4.1"])
def test_weights_load_bare_or_under_model(tmp_path, form):
    source, target = create_model("wrn_16_1", 5), create_model("wrn_16_1", 5)
    source(torch.randn(4, 3, 32, 32))
    state = source.state_dict()
    if form == "DataParallel":
        state = {f"module.{key}": value for key, value in state.items()}
    if form == "before 0.4.1":
        state = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save({"model": state, "epoch": 3} if form == "model" else state, tmp_path / "w.pth")
    loaded = load_weights(target, tmp_path / "w.pth")
    assert (loaded.get("epoch") == 3) == (form == "model")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(target.eval()(x), source.eval()(x), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["FASTKD_TEST_EVIL"],))


def foreign_file(kind: str, path: Path) -> Path:
    state = create_model("resnet8").state_dict()
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "no checkpoint":
        path.write_text("weights")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "no tensors":
        torch.save({"model": {"lr": 0.1}}, path)
    elif kind == "layout":
        torch.save(create_model("wrn_16_1").state_dict(), path)
    elif kind == "classes":
        torch.save(create_model("resnet8", 100).state_dict(), path)
    elif kind == "width":
        torch.save(state | {"conv1.weight": torch.randn(32, 3, 3, 3)}, path)
    elif kind == "nan":
        torch.save(state | {"fc.weight": state["fc.weight"] * float("nan")}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file"),
        ("truncated", "truncated"),
        ("no checkpoint", "not a checkpoint"),
        ("code", "not a checkpoint"),
        ("a list", "holds a list"),
        ("no tensors", "no state dict"),
        ("layout", "another layout"),
        ("classes", "trained for 100 classes, wanted 10"),
        ("width", r"is \(32, 3, 3, 3\), the model wants \(16, 3, 3, 3\)"),
        ("nan", "not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line_and_runs_no_code(tmp_path, monkeypatch, kind, words):
    monkeypatch.setenv("FASTKD_TEST_EVIL", str(tmp_path / "evil"))
    model = create_model("resnet8")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=words) as caught:
        load_weights(model, foreign_file(kind, tmp_path / "w.pth"))
    assert "\n" not in str(caught.value) and str(tmp_path / "w.pth") in str(caught.value)
    assert not (tmp_path / "evil").exists()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    not (os.environ.get("FASTKD_RESNET56_CIFAR100") and os.environ.get("FASTKD_DATA")),
    reason=(
        "set FASTKD_RESNET56_CIFAR100 to the published teacher of settings a and b, and FASTKD_DATA to a"
        " folder with CIFAR-100"
    ),
)
def test_the_published_resnet56_has_its_published_accuracy():
    """CRGuan/SAKD's teacher, published with 73.03 %; loader, model, data set and normalization together."""
    from fastkd.training import Batches, evaluate, load_dataset
    from fastkd.training.recipes import NORMALIZATIONS

    data = load_dataset("cifar100", Path(os.environ["FASTKD_DATA"]))
    model = create_model("resnet56", 100)
    load_weights(model, os.environ["FASTKD_RESNET56_CIFAR100"])
    mean, std = NORMALIZATIONS["ofd"]
    test = Batches(data.test_images, data.test_labels, mean, std, batch_size=500)
    accuracy = evaluate(
        model.to(memory_format=torch.channels_last), test, torch.autocast("cpu", enabled=False)
    )
    assert accuracy == pytest.approx(73.04, abs=0.011)
