"""Fused operations refuse a second derivative, and create_graph alone is no error."""

from __future__ import annotations

import pytest
import torch
from support import values

import fastkd
from fastkd import reference

pytestmark = pytest.mark.usefixtures("one_thread")


SECOND = {
    "attention_map": lambda m, x, y: m.attention_map(x).square().sum(),
    "attention_transfer_loss": lambda m, x, y: m.attention_transfer_loss(x, y),
    "fsp_matrix": lambda m, x, y: m.fsp_matrix(x, y).square().sum(),
    "fsp_loss": lambda m, x, y: m.fsp_loss([x, x], [y, y]),
}


@pytest.mark.parametrize("function", SECOND)
def test_a_second_derivative_is_refused_and_names_the_reference(cpp, function):
    x, y = (values((2, 3, 4, 4), torch.float64).requires_grad_() for _ in range(2))
    with fastkd.use_backend("cpp"):
        (grad,) = torch.autograd.grad(SECOND[function](fastkd, x, y), x, create_graph=True)
        with pytest.raises(RuntimeError, match="fastkd.reference") as caught:
            grad.square().sum().backward()
    assert "\n" not in str(caught.value)
    (want,) = torch.autograd.grad(SECOND[function](reference, x, y), x)
    torch.testing.assert_close(grad.detach(), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", SECOND)
def test_create_graph_alone_is_no_error(cpp, function):
    x, y = (values((2, 3, 4, 4), torch.float32).requires_grad_() for _ in range(2))
    with fastkd.use_backend("cpp"):
        first = torch.autograd.grad(SECOND[function](fastkd, x, y), x, create_graph=True)
        again = torch.autograd.grad(SECOND[function](fastkd, x, y), x)
    assert torch.equal(first[0], again[0])
