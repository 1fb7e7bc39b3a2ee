"""torchdistill's losses."""

from __future__ import annotations

import importlib
import sys
import types

import formulas
import pytest
import torch
import torch.nn.functional as F
from compat_cases import hcl, maps, rkd, same

from fastkd.compat import torchdistill

pytestmark = pytest.mark.usefixtures("one_thread")


def io(**features):
    return {name: {"output": value} for name, value in features.items()}


def place(path):
    return {"io": "output", "path": path}


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchdistills_attention(mode):
    pairs = {
        "pair1": {"student": place("a"), "teacher": place("c"), "weight": 3},
        "pair2": {"student": place("b"), "teacher": place("d")},
    }
    module = torchdistill.FusedATLoss(at_pairs=pairs, mode=mode)
    one = formulas.repdistiller_at if mode == "code" else formulas.paper_at
    same(
        lambda a, b, c, d: module(io(a=a, b=b), io(c=c, d=d), torch.zeros(2)),
        lambda a, b, c, d: 3 * one(a, c) + one(b, d),
        maps((2, 3, 6, 6), (2, 4, 5, 5), (2, 7, 6, 6), (2, 4, 5, 5)),
    )


def test_torchdistills_flow_matrices():
    names = ("student_first", "student_second", "teacher_first", "teacher_second")
    pairs = {
        "one": dict(zip(names, map(place, "abcd"))),
        "two": dict(zip(names, map(place, "baca")), weight=2),
    }
    pairs["two"]["teacher_first"], pairs["two"]["teacher_second"] = place("d"), place("c")
    module = torchdistill.FusedFSPLoss(fsp_pairs=pairs)

    def published(a, b, c, d):
        total = 0.0
        for weight, s, t in ((1, (a, b), (c, d)), (2, (b, a), (d, c))):
            (own,), (other,) = formulas.bmm_fsp(s, "max"), formulas.bmm_fsp(t, "max")
            total += weight * (own - other).square().sum(1).sqrt().sum() / len(a)
        return total

    same(
        lambda a, b, c, d: module(io(a=a, b=b), io(c=c, d=d)),
        published,
        maps((2, 3, 8, 8), (2, 5, 4, 4), (2, 3, 8, 8), (2, 5, 4, 4)),
    )


@pytest.mark.parametrize(
    "alpha, beta, reduction", [(0.5, None, "batchmean"), (0.3, 0.9, "sum"), (0, 1.0, "batchmean")]
)
def test_torchdistills_soft_targets(alpha, beta, reduction):
    module = torchdistill.FusedKDLoss("fc", "output", "head", "output", 4.0, alpha, beta, reduction)
    labels = torch.tensor([1, 0, 6])
    share = 1 - alpha if beta is None else beta

    def published(s, t):
        soft = formulas.hinton(s, t) * (3 if reduction == "sum" else 1)
        hard = F.cross_entropy(s, labels, reduction="sum" if reduction == "sum" else "mean")
        return alpha * hard + share * soft if alpha else soft / 16

    tensors = maps((3, 7), (3, 7))
    same(lambda s, t: module(io(fc=s), io(head=t), labels), published, tensors)
    alone = module(io(fc=tensors[0]), io(head=tensors[1]))
    soft = formulas.hinton(*tensors) * (3 if reduction == "sum" else 1) / 16
    torch.testing.assert_close(alone, soft, rtol=1e-10, atol=0)


def test_torchdistills_relations_and_hierarchical_context():
    tensors = maps((4, 3, 2), (4, 5))
    for distance, angle in ((1.0, 2.0), (None, 2.0), (1.0, 0)):
        module = torchdistill.FusedRKDLoss("a", "b", distance, angle, "mean")
        same(
            lambda a, b: module(io(a=a), io(b=b)), lambda a, b: rkd(a, b, distance or 0, angle or 0), tensors
        )
    level = torchdistill.FusedHierarchicalContextLoss("a", "output", "b", "output", output_sizes=[4, 2, 1])
    same(lambda a, b: level(io(a=(a, None)), io(b=b)), hcl, maps((2, 3, 8, 8), (2, 3, 8, 8)))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: torchdistill.FusedATLoss({}, "both"), "mode is 'both', wanted 'code' or 'paper'"),
        (lambda: torchdistill.FusedKDLoss("a", "output", "b", "output", 4.0), "alpha and beta are None"),
        (lambda: torchdistill.FusedRKDLoss("a", "b", 1, 2, "sum"), "reduction is 'sum', wanted 'mean'"),
        (
            lambda: torchdistill.FusedRKDLoss("a", "b", 1, 2)(io(c=torch.ones(2, 3)), io(b=torch.ones(2, 3))),
            "a, output: 'a' is not there, only c",
        ),
        (
            lambda: torchdistill.FusedHierarchicalContextLoss("a", "output", "b", "output", "mean", [2, 1]),
            r"output_sizes is \[2, 1\], wanted \[4, 2, 1\]",
        ),
    ],
)
def test_what_torchdistills_losses_cannot_do_is_one_line(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_importing_registers_where_torchdistill_is(monkeypatch):
    registered: list[type] = []
    modules = {name: types.ModuleType(name) for name in ("torchdistill", "torchdistill.losses")}
    registry = types.ModuleType("torchdistill.losses.registry")
    registry.register_mid_level_loss = registered.append
    for name, module in {**modules, registry.__name__: registry}.items():
        monkeypatch.setitem(sys.modules, name, module)
    importlib.reload(torchdistill)
    assert [kind.__name__ for kind in registered] == [
        "FusedATLoss",
        "FusedFSPLoss",
        "FusedKDLoss",
        "FusedRKDLoss",
        "FusedHierarchicalContextLoss",
    ]
