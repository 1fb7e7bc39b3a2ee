"""Gradients that the forward pass prepares: the same bits whether the upstream gradient was foreseen or not,
and never given away twice.
"""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder
from support import make

import fastkd
from fastkd.ops import attention, fsp
from fastkd.ops._grad_prefetch import GradPrefetch

LOSSES = {"attention_transfer_loss": attention, "fsp_loss": fsp}
pytestmark = pytest.mark.parametrize("function", LOSSES)


@pytest.fixture
def foresee(cpp, function, monkeypatch):
    """foresee(value): the next calls expect that upstream gradient, None for no guess."""

    def expect(value):
        upstream = GradPrefetch()
        upstream.expect = lambda: ((0, 0.0), value)
        monkeypatch.setattr(LOSSES[function], "_prefetch", upstream)

    with fastkd.use_backend("cpp"):
        yield expect


def chain(dtype=torch.float32, layout="contiguous", grad=False):
    return [make((3, c, n, n), dtype, layout).requires_grad_(grad) for c, n in ((3, 9), (16, 8), (32, 7))]


def gradients(function, student, teacher, upstream, **switches):
    """The gradients, and the operators that the backward pass ran."""
    loss = getattr(fastkd, function)(student, teacher, **switches)
    with Recorder() as recorder:
        found = torch.autograd.grad(
            loss,
            [x for x in (*student, *teacher) if x.requires_grad],
            torch.tensor(upstream, dtype=loss.dtype),
        )
    return found, recorder.fused


@pytest.mark.parametrize("upstream", [1.0, 1000.0, -0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_a_guess_changes_no_bit(function, foresee, dtype, layout, upstream):
    student, teacher = chain(dtype, layout, True), chain(dtype, layout)
    upstream = torch.tensor(upstream, dtype=torch.float32).item()
    foresee(upstream)
    guessed, ran = gradients(function, student, teacher, upstream)
    assert not ran, "the prepared gradients were not used"
    for wrong in (None, upstream + 1):
        foresee(wrong)
        computed, ran = gradients(function, student, teacher, upstream)
        assert ran == [f"{function}_backward"]
        for a, b, x in zip(guessed, computed, student):
            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == x.dtype


def test_every_switch_prepares_what_the_backward_computes(function, foresee):
    grid = {
        "attention_transfer_loss": [
            {"pool": p, "pool_mode": m, "p": q}
            for p in ("before", "after")
            for m in ("avg", "max")
            for q in (1.0, 2.0, 2.7)
        ]
    }
    for switches in grid.get(
        function, [{"pool_mode": "avg"}, {"pool_mode": "max"}, {"distance": "column_l2"}]
    ):
        student = chain(grad=True)
        teacher = [make((3, x.shape[1], 5, 6)) for x in student]
        foresee(3.0)
        guessed, ran = gradients(function, student, teacher, 3.0, weight=2.0, **switches)
        assert not ran
        foresee(None)
        computed, _ = gradients(function, student, teacher, 3.0, weight=2.0, **switches)
        assert all(torch.equal(a, b) for a, b in zip(guessed, computed)), switches


def test_a_second_backward_pass_has_gradients_of_its_own(function, foresee):
    student, teacher = chain(grad=True), chain()
    foresee(1.0)
    loss = getattr(fastkd, function)(student, teacher)
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in student]
    loss.backward()
    for x, once in zip(student, first):
        assert torch.equal(x.grad, once + once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_teacher_and_a_part_of_the_student_may_want_gradients(function, foresee):
    def one(expected):
        torch.manual_seed(7)
        student, teacher = chain(), chain(grad=True)
        student[1].requires_grad_()
        foresee(expected)
        return gradients(function, student, teacher, 2.0)[0]

    assert all(torch.equal(a, b) for a, b in zip(one(2.0), one(None)))


def test_one_stage_of_each_side_may_want_a_gradient(function, foresee):
    """As many gradients are prepared as are wanted, but not the same ones."""

    def one(expected):
        torch.manual_seed(8)
        student, teacher = chain()[1:], chain()[1:]
        student[0].requires_grad_()
        teacher[1].requires_grad_()
        foresee(expected)
        return gradients(function, student, teacher, 2.0)[0]

    assert all(torch.equal(a, b) for a, b in zip(one(2.0), one(None)))


def test_a_second_derivative_is_refused_all_the_same(function, foresee):
    student, teacher = chain(grad=True), chain()
    foresee(1.0)
    loss = getattr(fastkd, function)(student, teacher)
    grad, *_ = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match=f"reference.{function}"):
        grad.sum().backward()


def test_what_is_expected(function):
    upstream = GradPrefetch()

    def step(value):
        situation, expected = upstream.expect()
        upstream.saw(situation, value)
        return expected

    assert step(1024.0) == 1.0  # a loss alone, the weight inside
    assert step(1024.0) is None
    assert step(float("nan")) == 1024.0  # a loss scale
    assert step(float("nan")) is None
    assert step(1024.0) is None


STEPS = {  # the factors of a step's losses, and how its backward passes go
    "one sum": ([1.0, 2.0], "sum"),
    "one sum of three": ([1.0, 2.0, 1.0], "sum"),
    "a backward pass each": ([1.0, 2.0], "each"),
    "two backward passes at the end": ([3.0, 2.0], "end"),
    "one loss in two micro-batches": ([0.5, 0.5], "each"),
    "the second is only looked at": ([2.0, 0.0], "first"),
    "the first is only looked at": ([0.0, 2.0], "last"),
}


@pytest.mark.parametrize("step", STEPS)
def test_every_loss_of_a_step_keeps_its_prepared_gradient(function, cpp, step, monkeypatch):
    """Losses of equal shapes, several in a step: from the third step on, all that get a gradient have it from
    the forward pass.
    """
    monkeypatch.setattr(LOSSES[function], "_prefetch", GradPrefetch())
    factors, way = STEPS[step]
    student, teacher = chain(grad=True), chain()
    ran = []
    with fastkd.use_backend("cpp"):
        for _ in range(6):
            with Recorder() as recorder:
                losses = []
                for factor in factors:
                    losses.append(factor * getattr(fastkd, function)(student, teacher))
                    if way == "each":
                        losses[-1].backward()
                for loss in {
                    "sum": [sum(losses)],
                    "end": losses,
                    "first": losses[:1],
                    "last": losses[-1:],
                    "each": [],
                }[way]:
                    loss.backward()
            ran.append(recorder.fused.count(f"{function}_backward"))
    assert sum(ran[2:]) == 0, ran


def test_a_gradient_that_keeps_changing_is_not_prepared_for(function):
    """Neither where it is new each time, nor where it cannot be told from what came before."""
    upstream = GradPrefetch()
    for values in [1.0 + i / 7 for i in range(1000)], [1.0, 1.0, 2.0] * 30:
        wrong = 0
        for value in values:
            situation, expected = upstream.expect()
            wrong += expected is not None and expected != value
            upstream.saw(situation, value)
        assert wrong <= 3 and len(upstream._known) + len(upstream._doubted) <= 256, wrong
