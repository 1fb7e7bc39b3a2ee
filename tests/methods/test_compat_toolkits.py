"""fastkd.compat.mdistiller and .torchdistill: the originals' signatures, and the formulas' numbers."""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import formulas
import pytest
import torch
import torch.nn.functional as F
from support import evaluate, values

from fastkd.compat import mdistiller, torchdistill

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64


def same(ours, theirs, tensors) -> None:
    a, b = evaluate(ours, tensors), evaluate(theirs, tensors)
    torch.testing.assert_close(a.output, b.output, rtol=1e-10, atol=0)
    torch.testing.assert_close(a.grads, b.grads, rtol=1e-9, atol=1e-13)


def maps(*shapes):
    return [values(shape, F64) for shape in shapes]


def relations(x):
    """Distances of all pairs divided by their mean, and the cosines at j of all triples (i, j, k)."""
    x = x.flatten(1)
    size = len(x)
    apart = [[(x[i] - x[j]).norm() for j in range(size)] for i in range(size)]
    mean = sum(apart[i][j] for i in range(size) for j in range(size) if i != j) / (size * (size - 1))
    zero = x.new_zeros(())
    distances = [apart[i][j] / mean if i != j else zero for i in range(size) for j in range(size)]
    cosines = [
        (x[i] - x[j]) @ (x[k] - x[j]) / (apart[i][j] * apart[k][j]) if j not in (i, k) else zero
        for i in range(size)
        for j in range(size)
        for k in range(size)
    ]
    return torch.stack(distances), torch.stack(cosines)


def rkd(s, t, distance, angle):
    pairs = zip((distance, angle), relations(s), relations(t))
    return sum(factor * F.smooth_l1_loss(a, b) for factor, a, b in pairs)


def hcl(s, t):
    """Of one level of 6 x 6 or 8 x 8: full size, 4 x 4, 2 x 2, 1 x 1 with weights 1, 1/2, 1/4, 1/8."""
    total = sum(
        weight * F.mse_loss(formulas.pool(s, size, "avg"), formulas.pool(t, size, "avg"))
        for weight, size in ((1, s.shape[2:]), (0.5, (4, 4)), (0.25, (2, 2)), (0.125, (1, 1)))
    )
    return total / 1.875


@pytest.mark.parametrize(
    "function, wanted",
    [
        (mdistiller.kd_loss, ["logits_student", "logits_teacher", "temperature"]),
        (mdistiller.dkd_loss, ["logits_student", "logits_teacher", "target", "alpha", "beta", "temperature"]),
        (mdistiller.single_stage_at_loss, ["f_s", "f_t", "p"]),
        (mdistiller.at_loss, ["g_s", "g_t", "p"]),
        (mdistiller.rkd_loss, ["f_s", "f_t", "squared", "eps", "distance_weight", "angle_weight"]),
        (mdistiller.feat_loss, ["source", "target", "margin"]),
        (mdistiller.hcl_loss, ["fstudent", "fteacher"]),
        (mdistiller.ConvReg, ["s_shape", "t_shape", "use_relu"]),
        (
            mdistiller.CRD,
            ["feat_s_channel", "feat_t_channel", "feat_dim", "num_data", "k", "momentum", "temperature"],
        ),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_signatures_are_mdistillers(function, wanted):
    assert [*inspect.signature(function).parameters] == wanted
    assert function.__name__ in mdistiller.__all__


def test_mdistillers_losses_of_logits_and_maps():
    same(lambda s, t: mdistiller.kd_loss(s, t, 4), formulas.hinton, maps((5, 7), (5, 7)))
    labels, (teacher,) = torch.tensor([6, 0, 3, 3, 1]), maps((5, 7))
    same(
        lambda s: mdistiller.dkd_loss(s, teacher, labels, 1.5, 6, 4),
        lambda s: formulas.mdistiller_dkd(s, teacher, labels, 1.5, 6, 4),
        maps((5, 7)),
    )
    s, t = maps((2, 3, 9, 9), (2, 4, 5, 5)), maps((2, 4, 9, 9), (2, 4, 8, 8))
    (more,) = maps((2, 6, 4, 4))  # the shorter list decides

    def published(*x):
        return sum(formulas.repdistiller_at(a, b, 3) for a, b in zip(x[:2], x[2:]))

    same(lambda *x: mdistiller.at_loss([*x[:2], more], x[2:], 3), published, [*s, *t])
    same(
        lambda s, t: mdistiller.single_stage_at_loss(s, t, 3),
        lambda s, t: formulas.repdistiller_at(s, t, 3),
        [s[0], t[0]],
    )


def test_mdistillers_relations():
    same(mdistiller.rkd_loss, lambda s, t: rkd(s, t, 25, 50), maps((4, 3, 2), (4, 5)))
    same(
        lambda s, t: mdistiller.rkd_loss(s, t, False, 1e-12, 2, 0),
        lambda s, t: rkd(s, t, 2, 0),
        maps((4, 3), (4, 5)),
    )
    with pytest.raises(ValueError, match="squared is True, wanted False"):
        mdistiller.rkd_loss(*maps((4, 3), (4, 3)), squared=True)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1)])
def test_mdistillers_partial_distance(shape):
    margin = torch.tensor([-0.5, -1.0, 0.0], dtype=F64)

    def published(s, t):
        wide = margin[None, :, None, None].expand_as(s)
        between = (s > t) & (t > wide) & (t <= 0)
        return (
            torch.where((s > wide) & (t <= wide), s - wide, 0.0).square()
            + torch.where(between | (t > 0), s - t, 0.0).square()
        ).sum() / len(s)

    same(
        lambda s, t: mdistiller.feat_loss(s, t, margin.view(shape)),
        published,
        maps((2, 3, 4, 4), (2, 3, 4, 4)),
    )


def test_mdistillers_hierarchical_context():
    tensors = maps((2, 3, 6, 6), (2, 4, 8, 8), (2, 3, 6, 6), (2, 4, 8, 8))
    same(lambda *x: mdistiller.hcl_loss(x[:2], x[2:]), lambda *x: hcl(x[0], x[2]) + hcl(x[1], x[3]), tensors)


def test_mdistillers_regressor_takes_shapes_with_the_batch():
    regressor = mdistiller.ConvReg((2, 3, 8, 8), (2, 5, 4, 4))
    assert regressor(torch.randn(2, 3, 8, 8)).shape == (2, 5, 4, 4) and regressor.relu
    assert not mdistiller.ConvReg((2, 3, 8, 8), (2, 5, 4, 4), use_relu=False).relu
    with pytest.raises(ValueError, match=r"t_shape is \(5, 4, 4\), wanted \(N, C, H, W\)"):
        mdistiller.ConvReg((2, 3, 8, 8), (5, 4, 4))


def test_mdistillers_crd_has_its_banks_and_moves_their_rows():
    torch.manual_seed(0)
    module = mdistiller.CRD(5, 7, 4, 9, k=3).double()
    banks = module.contrast.student_bank.clone(), module.contrast.teacher_bank.clone()
    f_s, f_t, index = values((2, 5), F64), values((2, 7), F64), torch.tensor([8, 2])
    rows = torch.tensor([[8, 0, 1, 3], [2, 5, 5, 7]])
    loss = module(f_s, f_t, index, rows)

    embedded, wanted = [F.normalize(module.embed_s(f_s)), F.normalize(module.embed_t(f_t))], 0.0
    for x, bank in zip(embedded, reversed(banks)):
        odds = torch.stack([(bank[row] @ y / 0.07).exp() for y, row in zip(x, rows)])
        odds = odds / (odds.mean() * 9)
        noise = 3 / 9
        wanted -= ((odds[:, 0] / (odds[:, 0] + noise + 1e-7)).log().sum()) / 2
        wanted -= ((noise / (odds[:, 1:] + noise + 1e-7)).log().sum()) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for bank, old, x in zip((module.contrast.student_bank, module.contrast.teacher_bank), banks, embedded):
        moved = F.normalize(0.5 * old[index] + 0.5 * x)
        torch.testing.assert_close(bank[index], moved.detach(), rtol=1e-12, atol=0)
        others = [i for i in range(9) if i not in (8, 2)]
        assert torch.equal(bank[others], old[others])
    first = module.contrast.normalizers.clone()
    module(f_s, f_t, index, rows).backward()
    assert torch.equal(module.contrast.normalizers, first) and module.embed_s.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"contrast_idx is \(2, 3\), wanted \(N, k \+ 1\), k = 3"):
        module(f_s, f_t, index, rows[:, :3])


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


PLACE = {"path": "l", "io": "output"}
PAIR = {"student": PLACE, "teacher": PLACE}


def crd(**options):
    sizes = {"feat_s_channel": 6, "feat_t_channel": 7, "feat_dim": 8, "num_data": 9, "k": 2}
    return mdistiller.CRD(**{**sizes, **options})


def crd_loss(idx, contrast_idx=None):
    contrast_idx = torch.zeros(3, 3, dtype=torch.int64) if contrast_idx is None else contrast_idx
    return crd()(torch.randn(3, 6), torch.randn(3, 7), idx, contrast_idx)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mdistiller.feat_loss(*torch.zeros(2, 4, 6, 8, 8), [0.0] * 6), "margin is list"),
        (
            lambda: mdistiller.feat_loss(*torch.zeros(2, 4, 6, 8, 8), torch.zeros(2, 3)),
            r"margin is \(2, 3\) float32 on cpu, wanted \(C,\)",
        ),
        (lambda: mdistiller.ConvReg(6, 10), r"s_shape is 6, wanted \(N, C, H, W\)"),
        (lambda: crd(feat_dim=0), "feat_dim is 0, wanted at least 1"),
        (lambda: crd(k=0), "k is 0, wanted at least 1"),
        (lambda: crd_loss(torch.arange(2)), r"idx is \(2,\) int64 on cpu, wanted \(3,\)"),
        (lambda: crd_loss(torch.arange(3.0)), r"idx is \(3,\) float32 on cpu, wanted int64"),
        (lambda: crd_loss(torch.arange(3) + 8), "idx has 10, wanted rows 0 to 8 of the bank"),
        (lambda: crd_loss(torch.arange(3), [1]), "contrast_idx is list, wanted a tensor"),
        (lambda: torchdistill.FusedATLoss([PAIR]), "at_pairs is .*, wanted pairs by name"),
        (lambda: torchdistill.FusedFSPLoss({}), "fsp_pairs is {}, wanted pairs by name"),
        (
            lambda: torchdistill.FusedATLoss({"a": {"student": PLACE}}),
            r"at_pairs\['a'\] has None for 'teacher', wanted its path and io",
        ),
        (
            lambda: torchdistill.FusedATLoss({"a": {**PAIR, "weight": "x"}}),
            r"at_pairs\['a'\]\['weight'\] is 'x' \(str\), wanted a number",
        ),
        (
            lambda: torchdistill.FusedATLoss({"a": PAIR})({"m": {}}, {"m": {}}),
            "l, output: 'l' is not there, only m",
        ),
        (
            lambda: torchdistill.FusedATLoss({"a": PAIR})({"l": {"input": 0}}, {}),
            "l, output: 'output' is not there, only input",
        ),
        (lambda: torchdistill.FusedKDLoss(*"abcd", 4.0, alpha="x"), r"alpha is 'x' \(str\), wanted a number"),
        (lambda: torchdistill.FusedKDLoss(*"abcd", 0, alpha=0.1), "temperature is 0, wanted a finite number"),
        (
            lambda: torchdistill.FusedKDLoss(*"abcd", 4.0, alpha=0.1, reduction="x"),
            "reduction is 'x', wanted one of",
        ),
    ],
)
def test_misuse_is_one_line(call, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as caught:
        call()
    assert "\n" not in str(caught.value)
