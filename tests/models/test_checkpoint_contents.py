"""What else scripts keep in a checkpoint: it is passed over, and nothing in it runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import os
import pathlib
import pickle
import random
import subprocess

import numpy as np
import pytest
import torch
from checkpoint_cases import formats, network, same, save
from torch import nn

from fastkd.models import WeightsError, create_model, load_weights, read_checkpoint
from fastkd.models.weights import Unread


@pytest.fixture(scope="module")
def source():
    return network()


class Colour(enum.Enum):
    RED = 1


class Config(dict):
    """As yacs and easydict have them."""

    __getattr__ = dict.__getitem__


class Meters(list):
    pass


class Slotted:
    __slots__ = ("value",)

    def __init__(self):
        self.value = torch.ones(2)


def halved(epoch):
    return 0.5**epoch


def beside():
    """What training scripts keep beside the weights."""
    layer = nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    adam.step()
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, 10)
    meters = collections.defaultdict(list)
    meters["loss"].append(1.0)
    return {
        "Namespace": argparse.Namespace(model_s="resnet8x4", lr=0.05, path=pathlib.Path("x"), milestones=[1]),
        "NumPy scalars": [np.float64(71.5), np.int64(3), np.bool_(True), np.float32(1)],
        "NumPy arrays": [np.arange(3.0), np.array(["a", "b"]), np.array([{}, None], dtype=object)],
        "empty NumPy array": np.zeros((2, 0)), "random state": random.getstate(),
        "random states of NumPy": (np.random.get_state(), np.random.default_rng(0)),
        "random state of PyTorch": torch.get_rng_state(),
        "defaultdict": meters, "OrderedDict": collections.OrderedDict(a=1, b=[2]),
        "deque": collections.deque([1.0, 2.0], maxlen=3), "Path": pathlib.Path("/data"),
        "Enum": [Colour.RED, enum.auto],
        "datetime": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        "date": [datetime.date(2020, 1, 1), datetime.timedelta(1)],
        "optimizer": adam.state_dict(),
        "scheduler": [cycle.state_dict(), torch.optim.lr_scheduler.MultiStepLR(adam, [1, 2]).state_dict()],
        "whole optimizer": adam, "lambda's scheduler": torch.optim.lr_scheduler.LambdaLR(adam, halved),
        "a dict's heir": Config(lr=0.1, nested=Config(a=torch.ones(2))), "a list's heir": Meters([1, 2]),
        "with slots": Slotted(), "set": {1, 2}, "frozenset": frozenset([1]), "complex": 1j, "bytes": b"ab",
        "bytearray": bytearray(b"ab"), "long": 1 << 70, "criterion": nn.CrossEntropyLoss(),
        "function": halved, "class": Colour, "device": torch.device("cpu"), "dtype": torch.float16,
    }  # fmt: skip


@formats
def test_weights_load_beside_whatever_scripts_keep_there(tmp_path, source, zipped):
    """All at once in RepDistiller's layout, and each alone."""
    content, allowed = beside(), set(torch.serialization.get_safe_globals())
    if not zipped:
        # of a module the old format kept the source code, which PyTorch refuses to look at
        del content["criterion"]
    every = {"epoch": 240, "model": source.state_dict(), **content, "best_acc": content["NumPy scalars"][0]}
    for held in (every, *({"model": source.state_dict(), key: value} for key, value in content.items())):
        target = create_model("resnet8", 10)
        loaded = load_weights(target, save(held, tmp_path / "w.pth", zipped))
        assert same(target, source) and set(loaded) == set(held)
    loaded = read_checkpoint(save(every, tmp_path / "w.pth", zipped))
    assert (
        isinstance(loaded["Namespace"], Unread)
        and str(loaded["Namespace"]) == "<argparse.Namespace, not read>"
    )
    assert (
        loaded["epoch"] == 240 and loaded["defaultdict"] == {"loss": [1.0]} and loaded["deque"] == [1.0, 2.0]
    )
    assert loaded["a dict's heir"]["lr"] == 0.1 and torch.equal(
        loaded["a dict's heir"]["nested"]["a"], torch.ones(2)
    )
    assert loaded["a list's heir"] == [1, 2] and loaded["OrderedDict"] == {"a": 1, "b": [2]}
    assert not isinstance(loaded["a dict's heir"], Config) and allowed == set(
        torch.serialization.get_safe_globals()
    )


@pytest.mark.parametrize("words", ["append to lists", "extend lists"])
def test_a_lists_heir_is_known_by_the_words_of_each_pytorch(tmp_path, monkeypatch, words):
    """PyTorch 2.14 refuses by the former; 2.11 and 2.15 by the latter where there are several items."""
    load = torch.load

    def reworded(*args, **kwargs):
        try:
            return load(*args, **kwargs)
        except pickle.UnpicklingError as error:
            text = str(error).replace("append to lists", words).replace("extend lists", words)
            raise pickle.UnpicklingError(text) from None

    monkeypatch.setattr(torch, "load", reworded)
    held = {"model": {}, "losses": Meters([1, 2]), "last": collections.deque([1.0, 2.0], maxlen=3)}
    loaded = read_checkpoint(save(held, tmp_path / "w.pth", True))
    assert loaded["losses"] == [1, 2] and loaded["last"] == [1.0, 2.0]


@formats
def test_repdistillers_last_checkpoint_loads(tmp_path, source, zipped):
    """train_student.py: {'opt': opt, 'model': ...}; train_teacher.py: {'epoch', 'model', 'best_acc',
    'optimizer'}.
    """
    options = argparse.Namespace(
        model_s="resnet8", trial="1", learning_rate=0.05, lr_decay_epochs=[150, 180, 210]
    )
    target = create_model("resnet8", 10)
    load_weights(
        target, save({"opt": options, "model": source.state_dict()}, tmp_path / "resnet8_last.pth", zipped)
    )
    assert same(target, source)


class Runs:
    """Whose unpickling calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Wakes:
    def __setstate__(self, state):
        os.mkdir(state["folder"])


@formats
@pytest.mark.parametrize("how", ["exec", "subprocess", "method", "setstate", "mkdir"])
def test_nothing_in_a_file_runs(tmp_path, source, zipped, how):
    folder = str(tmp_path / "evil")
    wakes = Wakes()
    wakes.folder = folder
    evil = {
        "exec": Runs(exec, f"import os; os.mkdir({folder!r})"),
        "subprocess": Runs(subprocess.call, ["mkdir", folder]),
        "method": Runs(pathlib.Path.mkdir, pathlib.Path(folder)),
        "setstate": wakes,
        "mkdir": Runs(os.mkdir, folder),
    }[how]
    path = save({"model": source.state_dict(), "opt": evil}, tmp_path / "w.pth", zipped)
    target = create_model("resnet8", 10)
    refused = {"mkdir": f"{os.mkdir.__module__}.mkdir", "method": "builtins.getattr"}
    if how in refused:  # PyTorch blocks the whole module; what an unread function returns cannot be called
        with pytest.raises(WeightsError, match=rf"w\.pth: .*it holds {refused[how]}, which cannot be read$"):
            load_weights(target, path)
    else:
        load_weights(target, path)
        assert same(target, source)
    assert not os.path.exists(folder)
    torch.load(path, weights_only=False)  # the file does what it should not when it is trusted
    assert os.path.exists(folder)


@formats
def test_what_cannot_be_read_is_named_by_its_class(tmp_path, source, zipped):
    target = create_model("resnet8", 10)
    for content, words in [
        (
            source,
            (
                r"holds (an object of class )?fastkd\.models\.resnet\.ResNet, w(anted a state dict|hich"
                r" cannot be read)"
            ),
        ),
        (
            {"model": source, "epoch": 3},
            (
                r"'model' is an object of class fastkd\.models\.resnet\.ResNet|it holds"
                r" fastkd\.models\.resnet\.ResNet, which"
            ),
        ),
        ([1, 2], "holds a list, wanted a state dict or a dict with one under 'model'"),
    ]:
        with pytest.raises(WeightsError, match=words) as caught:
            load_weights(target, save(content, tmp_path / "w.pth", zipped))
        assert "\n" not in str(caught.value)
