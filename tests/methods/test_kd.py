"""kd_loss: values, gradients and dtypes, under whatever backend is the default."""

from __future__ import annotations

import itertools

import formulas
import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, check, make, name, ref, values

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = ("contiguous", "swapped", "sliced", "stepped", "expanded_batch", "expanded_channels")


def kd_check(s, t, temperature=4.0, upstream=None, **switches):
    ours, exact = (lambda s, t, f=f: f(s, t, temperature, **switches) for f in (fastkd.kd_loss, ref.kd_loss))
    # every backend serves it by the same few lines
    check("reference", ours, exact, [s, t], upstream=upstream)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "-".join(map(name, pair))
)
def test_kd_matches_the_reference_for_mixed_dtypes(dtypes, reduction):
    s, t = (5 * values((7, 13), dtype) for dtype in dtypes)
    kd_check(
        s,
        t,
        reduction=reduction,
        weight=0.9,
        upstream=torch.randn(7, 13) if reduction == "none" else torch.tensor(1.7),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20.0])
def test_kd_matches_the_reference_in_every_layout(temperature, layout):
    kd_check(make((5, 10), layout=layout), make((5, 10), layout=layout), temperature)


@pytest.mark.parametrize("shape", [(1, 2), (1, 1000), (128, 2), (3, 5)], ids=name)
def test_kd_matches_the_reference_for_odd_shapes(shape):
    kd_check(values(shape, torch.float32), values(shape, torch.float32))


def test_kd_is_the_written_formula_at_the_defaults():
    s, t = values((6, 10), torch.float64), values((6, 10), torch.float64)
    torch.testing.assert_close(
        fastkd.kd_loss(s, t), formulas.kd_loss(s, t, 4.0, "batchmean"), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(fastkd.kd_loss(s, t), formulas.hinton(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kd_is_finite_for_extreme_logits_where_the_textbook_form_is(reduction):
    s, t = (
        torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4]]),
    )
    textbook = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction=reduction)
    assert textbook.isfinite().all()
    torch.testing.assert_close(fastkd.kd_loss(s, t, reduction=reduction), textbook)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_kd_warns_of_nothing(reduction):
    fastkd.kd_loss(torch.randn(4, 5), torch.randn(4, 5), reduction=reduction)


def test_kd_gradient_in_half_precision_keeps_weight_and_loss_scale():
    s, t = values((64, 100), torch.float16), values((64, 100), torch.float16)
    kd_check(s, t, weight=0.9, upstream=torch.tensor(1024.0))


def test_kd_is_zero_for_equal_logits_and_for_itself():
    s = values((4, 9), torch.float32).requires_grad_()
    loss = fastkd.kd_loss(s, s)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss.abs() < 1e-6 and grad.abs().max() < 1e-6


INF = float("inf")


@pytest.mark.parametrize("temperature, right", [(1.0, 0.2574), (4.0, 0.2796)])
def test_a_class_excluded_by_both_adds_nothing(temperature, right):
    s = torch.tensor([[1, 0.5, -INF]], requires_grad=True)
    t = torch.tensor([[1.0, 2, -INF]], requires_grad=True)
    loss = fastkd.kd_loss(s, t, temperature)
    assert loss.item() == pytest.approx(right, abs=5e-5)
    two = [x.detach()[:, :2].requires_grad_() for x in (s, t)]
    for grad, want in zip(
        torch.autograd.grad(loss, (s, t)), torch.autograd.grad(fastkd.kd_loss(*two, temperature), two)
    ):
        torch.testing.assert_close(grad, F.pad(want, (0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_excluded_by_the_teacher_alone_adds_nothing(dtype):
    s, t = (
        torch.tensor([[1, 0.5, 0.3]], dtype=dtype, requires_grad=True),
        torch.tensor([[1, 2, -INF]], dtype=dtype),
    )
    loss = fastkd.kd_loss(s, t)
    want = 16 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, s)[0] for value in (loss, want)))


@pytest.mark.parametrize(
    "teacher", [[1.0, 2, 3], [1.0, 2, -3000]], ids=["likely", "below the smallest number"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_excluded_by_the_student_alone_makes_the_loss_infinite(dtype, teacher):
    s, t = (
        torch.tensor([[1, 0.5, -INF]], dtype=dtype, requires_grad=True),
        torch.tensor([teacher], dtype=dtype),
    )
    loss = fastkd.kd_loss(s, t, 1.0)
    assert loss == INF
    (grad,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(grad, s.detach().softmax(1) - t.softmax(1))
