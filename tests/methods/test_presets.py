"""Every preset in float64 against the formula of the implementation it is named after."""

from __future__ import annotations

import inspect

import formulas
import pytest
import torch
from support import evaluate, values

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
CHANNELS, SIZES = (5, 8, 3), (9, 5, 5)


def features(sizes=SIZES, channels=CHANNELS, n=3):
    return [values((n, c, s, s), F64) for c, s in zip(channels, sizes)]


def agree(module, published, student, teacher) -> None:
    n = len(student)
    ours = evaluate(lambda *x: module(list(x[:n]), list(x[n:])), [*student, *teacher])
    theirs = evaluate(lambda *x: published(x[:n], x[n:]), [*student, *teacher])
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-10, atol=0)
    for a, b in zip(ours.grads, theirs.grads):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * b.abs().max().item())


def stagewise(loss, factor):
    return lambda s, t: factor * sum(loss(a, b) for a, b in zip(s, t))


AT = {
    "zagoruyko": stagewise(formulas.zagoruyko_at, 1000),
    "repdistiller": stagewise(formulas.repdistiller_at, 1000),
    "mdistiller": stagewise(formulas.repdistiller_at, 1000),
    "hankyul2": stagewise(formulas.zagoruyko_at, 1000),
    "torchdistill": stagewise(formulas.zagoruyko_at, 1000),
    "kdzoo": stagewise(formulas.kdzoo_at, 1000 / len(SIZES)),
    # beta / 2 of equation 2, with the paper's beta of about 0.1
    "paper": stagewise(formulas.paper_at, 0.1 / 2),
}


@pytest.mark.parametrize("name", AT)
def test_attention_preset_is_its_published_formula(name):
    student, teacher = features(), features(channels=(4, 2, 9))
    agree(fastkd.AttentionTransfer.preset(name), AT[name], student, teacher)
    small = [x * 1e-4 for x in student]  # so small that the way eps enters is seen
    agree(fastkd.AttentionTransfer.preset(name), AT[name], small, teacher)


@pytest.mark.parametrize("name", ["repdistiller", "mdistiller"])
@pytest.mark.parametrize("teacher_sizes", [(4, 5, 3), (11, 6, 7)], ids=str)
def test_attention_preset_pools_the_larger_feature_before_the_power(name, teacher_sizes):
    agree(fastkd.AttentionTransfer.preset(name), AT[name], features(), features(teacher_sizes, (4, 2, 9)))


@pytest.mark.parametrize(
    "name, published", [("repdistiller", formulas.repdistiller_at), ("kdzoo", formulas.kdzoo_at)]
)
@pytest.mark.parametrize("p", [1, 3, 4])
def test_attention_preset_keeps_to_its_original_for_other_powers(name, published, p):
    """x.pow(p) keeps the sign of odd powers, abs(x)**p does not."""
    module = fastkd.AttentionTransfer.preset(name, p=float(p), weight=1.0, stage_reduce="sum")
    agree(module, stagewise(lambda s, t: published(s, t, p), 1), features(), features())


def pairwise(matrices, distance, factor):
    return lambda s, t: factor * sum(distance(a, b) for a, b in zip(matrices(s), matrices(t)))


def mse(a, b):
    return (a - b).pow(2).mean()


FSP = {
    "repdistiller": pairwise(formulas.repdistiller_fsp, mse, 1),
    "kdzoo": pairwise(formulas.bmm_fsp, mse, 1 / 2),
    "hankyul2": pairwise(formulas.bmm_fsp, mse, 1 / 2 / 3),
    "torchdistill": formulas.column_norms,
    "paper": pairwise(
        lambda x: formulas.bmm_fsp(x, "max"), lambda a, b: (a - b).pow(2).sum((1, 2)).mean(), 1
    ),
}


@pytest.mark.parametrize("teacher_sizes", [SIZES, (8, 4, 4), (6, 6, 11)], ids=str)
@pytest.mark.parametrize("name", FSP)
def test_fsp_preset_is_its_published_formula(name, teacher_sizes):
    agree(fastkd.FSP.preset(name), FSP[name], features(), features(teacher_sizes))


KD = {
    "zagoruyko": 0.9,
    "repdistiller": 0.9,
    "mdistiller": 0.9,
    "kdzoo": 0.1,
    "hankyul2": 1.0,
    "torchdistill": 0.1,
}


@pytest.mark.parametrize("name", KD)
def test_kd_preset_is_its_published_formula(name):
    s, t = values((6, 10), F64), values((6, 10), F64)
    ours = evaluate(fastkd.KD.preset(name), [s, t])
    theirs = evaluate(lambda s, t: KD[name] * formulas.hinton(s, t), [s, t])
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-10, atol=0)
    torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-9, atol=1e-15)


MODULES = [
    (fastkd.AttentionTransfer, AT, fastkd.attention_transfer_loss, {"weight": 1000.0}),
    (fastkd.FSP, FSP, fastkd.fsp_loss, {"weight": 1.0}),
    (fastkd.KD, KD, fastkd.kd_loss, {"weight": 0.9}),
]


@pytest.mark.parametrize("module, presets, function, published", MODULES)
def test_presets_can_be_overridden_and_name_their_weight(module, presets, function, published):
    assert module.preset("repdistiller").weight == published["weight"]
    assert module.preset("repdistiller", weight=2.5).weight == 2.5
    assert set(presets) == set(module.presets)


@pytest.mark.parametrize("module, presets, function, published", MODULES)
def test_an_unknown_preset_lists_the_known_ones(module, presets, function, published):
    with pytest.raises(ValueError) as caught:
        module.preset("nobody")
    assert all(name in str(caught.value) for name in presets) and "nobody" in str(caught.value)


@pytest.mark.parametrize("module, presets, function, published", MODULES)
def test_modules_take_the_functions_keywords_and_no_others(module, presets, function, published):
    defaults = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
    defaults.pop("mask", None)  # of each batch, so an argument of `forward`
    x = [values((3, 4), F64), values((3, 4), F64)] if module is fastkd.KD else [features(), features()]
    assert torch.equal(module(**defaults)(*x), function(*x))
    assert torch.equal(module(weight=3.0)(*x), function(*x, weight=3.0))
    with pytest.raises(TypeError, match="temprature"):
        module(temprature=4.0)
