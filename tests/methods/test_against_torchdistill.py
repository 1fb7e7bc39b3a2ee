"""What torchdistill itself builds, our losses beside its own: the same values and gradients."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from compat_cases import maps, same

import fastkd.compat.torchdistill

pytestmark = pytest.mark.usefixtures("one_thread")


def place(path):
    return {"io": "output", "path": path}


def io(**features):
    return {name: {"output": value} for name, value in features.items()}


@pytest.fixture
def both(torchdistill):
    """(its loss, ours) by the key of its own and the keyword arguments of its configuration files."""
    importlib.import_module("torchdistill.losses")
    registry = importlib.import_module("torchdistill.losses.registry")
    importlib.reload(fastkd.compat.torchdistill)  # as a configuration's "dependencies" import it

    def build(key, **kwargs):
        keys = key, f"Fused{key}"
        losses = [registry.get_mid_level_loss({"key": each, "kwargs": kwargs}) for each in keys]
        assert type(losses[0]).__module__ == "torchdistill.losses.mid_level"
        assert type(losses[1]).__module__ == "fastkd.compat.torchdistill"
        return losses

    return build


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention(both, mode):
    pairs = {
        "pair1": {"student": place("a"), "teacher": place("c"), "weight": 3},
        "pair2": {"student": place("b"), "teacher": place("d")},
    }
    theirs, ours = both("ATLoss", at_pairs=pairs, mode=mode)
    tensors = maps((3, 3, 6, 6), (3, 4, 5, 5), (3, 7, 6, 6), (3, 4, 5, 5))
    calls = [lambda a, b, c, d, f=f: f(io(a=a, b=b), io(c=c, d=d), torch.zeros(3)) for f in (ours, theirs)]
    same(*calls, tensors)


def test_flow_matrices(both):
    ends = ("student_first", "student_second", "teacher_first", "teacher_second")
    pairs = {
        "one": dict(zip(ends, map(place, "abcd"))),
        "two": {**dict(zip(ends, map(place, "badc"))), "weight": 2},
    }
    theirs, ours = both("FSPLoss", fsp_pairs=pairs)
    calls = [lambda a, b, c, d, f=f: f(io(a=a, b=b), io(c=c, d=d)) for f in (ours, theirs)]
    same(*calls, maps((2, 3, 8, 8), (2, 5, 4, 4), (2, 3, 8, 8), (2, 5, 4, 4)))


@pytest.mark.parametrize(
    "rest", [{"alpha": 0.5}, {"alpha": 0.3, "beta": 0.9, "reduction": "sum"}, {"alpha": 0}, {"beta": 1.0}]
)
def test_soft_targets(both, rest):
    ends = dict(zip(("student_module_path", "student_module_io"), ("fc", "output")))
    ends |= dict(zip(("teacher_module_path", "teacher_module_io"), ("head", "output")))
    theirs, ours = both("KDLoss", **ends, temperature=4.0, **rest)
    labels = torch.tensor([1, 0, 6])
    for targets in ((labels,), ()):
        calls = [lambda s, t, f=f: f(io(fc=s), io(head=t), *targets) for f in (ours, theirs)]
        same(*calls, maps((3, 7), (3, 7)))


@pytest.mark.parametrize("factors", [(1.0, 2.0), (0.5, 0), (0, 2.0)])
def test_relations(both, factors):
    names = {"student_output_path": "a", "teacher_output_path": "b", "reduction": "mean"}
    theirs, ours = both("RKDLoss", **names, dist_factor=factors[0], angle_factor=factors[1])
    tensors = maps((5, 3, 2, 2), (5, 4))
    # its teacher has no gradient
    calls = [lambda a, f=f: f(io(a=a), io(b=tensors[1])) for f in (ours, theirs)]
    same(*calls, tensors[:1])


def test_hierarchical_context(both):
    names = {"student_module_path": "a", "student_module_io": "output", "teacher_module_path": "b"}
    theirs, ours = both("HierarchicalContextLoss", **names, teacher_module_io="output")
    for side in (8, 4, 3):  # of a smaller map some levels are left out
        calls = [lambda a, b, f=f: f(io(a=(a, None)), io(b=b)) for f in (ours, theirs)]
        same(*calls, maps((2, 3, side, side), (2, 3, side, side)))


def test_the_configuration_of_docs_from_torchdistill(torchdistill):
    """What its YAML says is built by torchdistill's registry, and is the loss that its comment names."""
    yaml = pytest.importorskip("yaml")
    page = Path(__file__).resolve().parents[2] / "docs" / "from-torchdistill.md"
    (text,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    written = yaml.safe_load(text)
    registry = importlib.import_module("torchdistill.losses.registry")
    importlib.import_module("torchdistill.losses")
    for dependency in written["dependencies"]:
        importlib.reload(importlib.import_module(dependency["name"]))
    criterion = written["train"]["stage1"]["criterion"]
    ours = registry.get_mid_level_loss(criterion)
    theirs = registry.get_mid_level_loss({**criterion, "key": re.search(r"was '(\w+)'", text)[1]})
    calls = [lambda a, b, f=f: f(io(layer4=a), io(layer4=b), torch.zeros(3)) for f in (ours, theirs)]
    same(*calls, maps((3, 4, 5, 5), (3, 7, 5, 5)))
