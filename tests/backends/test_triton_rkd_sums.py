"""RKD's Triton kernels where sums have launches of their own, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from autograd_cases import gradients
from rkd_cases import LAUNCHED, agree, exact, on_a_line
from support import missing

import fastkd
from fastkd import kernels

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
SUMS = "rkd_sums_kernel"


@pytest.fixture
def adding_alone(monkeypatch):
    """Sums are added up by launches of their own however few they are, in several steps if they are two."""
    loss = pytest.importorskip("fastkd.kernels.rkd.loss")
    monkeypatch.setattr(loss, "_plans", type(loss._plans)())
    monkeypatch.setattr(loss, "AGAIN", 0)
    monkeypatch.setattr(loss, "ADDED_ALONE", 2)


@pytest.mark.parametrize("weights", [(25.0, 50.0), (3.0, 0.0), (0.0, 7.0)], ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 5), (17, 130, 61), (33, 9, 16)], ids=str)
def test_sums_of_large_batches_are_added_up_before(triton, launched, adding_alone, shape, weights):
    count, *widths = shape
    student, teacher = (triton(scale * torch.randn(count, width)) for scale, width in zip((3, 1), widths))
    teacher[2], student[1] = teacher[0], student[3]
    options = {"distance_weight": weights[0], "angle_weight": weights[1]}
    found = gradients(lambda s, t: fastkd.rkd_loss(s, t, **options), student, teacher)
    pairs, triples, gradient = LAUNCHED
    assert launched == [pairs, SUMS, triples, *([SUMS] if weights[0] else []), gradient]
    left = [on_a_line(x, weights[1]) for x in (student, teacher)]
    agree(found, exact(student, teacher, **options), cancelled=(0, *left))


def test_sums_that_were_added_up_before_are_the_same_bits_whatever_is_wanted(triton, adding_alone):
    student, teacher = triton(torch.randn(37, 21)), triton(torch.randn(37, 40))
    run = kernels.launcher("rkd_pass")
    both = run(student, teacher, 25.0, 50.0, True, True)
    assert all(torch.equal(a, b) for a, b in zip(both, run(student, teacher, 25.0, 50.0, True, True)))
    for needs in ((True, False), (False, True), (False, False)):
        for wanted, got, need in zip(both, run(student, teacher, 25.0, 50.0, *needs), (True, *needs)):
            assert not need or torch.equal(wanted, got)


def test_sums_that_nobody_wrote_are_left_alone(triton, adding_alone, monkeypatch):
    """Memory is not cleared: a NaN where no program has written must reach neither loss nor gradient."""
    original = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: original(*a, **k).fill_(float("nan")))
    student, teacher = triton(torch.randn(18, 5)), triton(torch.randn(18, 4))
    loss, _, theirs = kernels.launcher("rkd_pass")(student, teacher, 25.0, 50.0, False, True)
    wanted = exact(student, teacher)
    agree([loss, theirs], [wanted[0], wanted[2]])


@pytest.mark.parametrize(
    ("shape", "added"),
    [
        ((64, 64, 64), (False, False)),
        ((256, 2048, 512), (False, False)),
        ((352, 512, 512), (False, False)),
        ((353, 512, 512), (True, False)),
        ((512, 512, 64), (True, False)),
        ((640, 512, 512), (True, False)),
        ((641, 512, 2048), (True, True)),
        ((4096, 3, 512), (True, True)),
    ],
    ids=str,
)
def test_the_usual_batch_takes_three_launches(shape, added):
    plan = pytest.importorskip("fastkd.kernels.rkd.loss")._Plan
    count, *widths = shape
    tensors = [torch.empty(1, 1).expand(count, width) for width in widths]
    for needs in ((False, False), (True, False), (True, True)):
        made = plan(*tensors, needs, True, True)
        assert (made.pair_sums is not None, made.triple_sums is not None) == added
    assert plan(*tensors, (True, True), False, True).triple_sums is None


@pytest.mark.parametrize(("count", "added"), [(16, False), (17, True)])
def test_batches_beside_a_limit_match_float64(triton, launched, adding_alone, monkeypatch, count, added):
    """A limit of what 16 samples take: three programs of triples read four sums of three tiles of pairs."""
    monkeypatch.setattr("fastkd.kernels.rkd.loss.AGAIN", 3 * 3 * 4 * 8)
    tensors = [triton(torch.randn(count, width)) for width in (6, 9)]
    found = gradients(fastkd.rkd_loss, *tensors)
    pairs, triples, gradient = LAUNCHED
    assert launched == [pairs, *([SUMS] if added else []), triples, gradient]
    agree(found, exact(*tensors))
