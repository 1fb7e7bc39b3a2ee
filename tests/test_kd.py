"""kd_loss: values, gradients and dtypes, under whatever backend is the default."""

from __future__ import annotations

import itertools

import formulas
import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, check, law, make, name, values

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = ("contiguous", "swapped", "sliced", "stepped", "expanded_batch", "expanded_channels")


def kd_check(s, t, temperature=4.0, upstream=None, **switches):
    ours, exact = (lambda s, t, f=f: f(s, t, temperature, **switches) for f in (fastkd.kd_loss, law.kd_loss))
    check("reference", ours, exact, [s, t], upstream=upstream)  # every backend serves it by the same few lines


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "-".join(map(name, pair)))
def test_kd_matches_the_law_for_mixed_dtypes(dtypes, reduction):
    s, t = (5 * values((7, 13), dtype) for dtype in dtypes)
    kd_check(s, t, reduction=reduction, weight=0.9, upstream=torch.randn(7, 13) if reduction == "none" else torch.tensor(1.7))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0, 20.0])
def test_kd_matches_the_law_in_every_layout(temperature, layout):
    kd_check(make((5, 10), layout=layout), make((5, 10), layout=layout), temperature)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (128, 1), (3, 2)], ids=name)
def test_kd_matches_the_law_for_odd_shapes(shape):
    kd_check(values(shape, torch.float32), values(shape, torch.float32))


def test_kd_is_the_written_formula_at_the_defaults():
    s, t = values((6, 10), torch.float64), values((6, 10), torch.float64)
    torch.testing.assert_close(fastkd.kd_loss(s, t), formulas.kd_loss(s, t, 4.0, "batchmean"), rtol=1e-12, atol=0)
    torch.testing.assert_close(fastkd.kd_loss(s, t), formulas.hinton(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kd_is_finite_for_extreme_logits_where_the_textbook_form_is(reduction):
    s, t = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[1e4, -1e4, 0.0], [3e4, 0.0, -3e4]])
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
