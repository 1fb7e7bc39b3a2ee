"""fastkd.compat.mdistiller and .torchdistill: the originals' signatures, and the formulas' numbers."""

from __future__ import annotations

import inspect

import formulas
import pytest
import torch
import torch.nn.functional as F
from compat_cases import F64, hcl, maps, rkd, same
from support import values

from fastkd.compat import mdistiller, torchdistill

pytestmark = pytest.mark.usefixtures("one_thread")


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
    module = mdistiller.CRD(5, 7, 4, 9, k=3, momentum=0.75, temperature=0.1).double()
    banks = module.contrast.student_bank.clone(), module.contrast.teacher_bank.clone()
    f_s, f_t, index = values((2, 5), F64), values((2, 7), F64), torch.tensor([8, 2])
    rows = torch.tensor([[8, 0, 1, 3], [2, 5, 5, 7]])
    loss = module(f_s, f_t, index, rows)

    embedded, wanted = [F.normalize(module.embed_s(f_s)), F.normalize(module.embed_t(f_t))], 0.0
    for x, bank in zip(embedded, reversed(banks)):
        odds = torch.stack([(bank[row] @ y / 0.1).exp() for y, row in zip(x, rows)])
        odds = odds / (odds.mean() * 9)
        noise = 3 / 9
        wanted -= ((odds[:, 0] / (odds[:, 0] + noise + 1e-7)).log().sum()) / 2
        wanted -= ((noise / (odds[:, 1:] + noise + 1e-7)).log().sum()) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for bank, old, x in zip((module.contrast.student_bank, module.contrast.teacher_bank), banks, embedded):
        moved = F.normalize(0.75 * old[index] + 0.25 * x)
        torch.testing.assert_close(bank[index], moved.detach(), rtol=1e-12, atol=0)
        others = [i for i in range(9) if i not in (8, 2)]
        assert torch.equal(bank[others], old[others])
    first = module.contrast.normalizers.clone()
    module(f_s, f_t, index, rows).backward()
    assert torch.equal(module.contrast.normalizers, first) and module.embed_s.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"contrast_idx is \(2, 3\), wanted \(N, k \+ 1\), k = 3"):
        module(f_s, f_t, index, rows[:, :3])


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


def test_mdistillers_crd_takes_a_teacher_of_inference_mode():
    module, index = mdistiller.CRD(5, 7, 4, 9, k=3), torch.tensor([8, 2])
    with torch.inference_mode():
        f_t = torch.randn(2, 7)
    module(torch.randn(2, 5), f_t, index, torch.tensor([[8, 0, 1, 3], [2, 5, 5, 7]])).backward()
    assert module.embed_t.weight.grad.any()
