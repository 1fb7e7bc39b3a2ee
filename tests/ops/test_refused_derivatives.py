"""Fused operations refuse a second derivative, and create_graph alone is no error."""

from __future__ import annotations

import pytest
import torch
from second_derivatives import SCALARS, refused
from support import values

import fastkd
from fastkd import reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("function", SCALARS)
def test_a_second_derivative_is_refused_and_names_the_reference(cpp, function):
    x, y = (values((2, 3, 4, 4), torch.float64).requires_grad_() for _ in range(2))
    with fastkd.use_backend("cpp"):
        grad = refused(function, x, y)
    (want,) = torch.autograd.grad(SCALARS[function](reference, x, y), x)
    torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", SCALARS)
def test_create_graph_alone_is_no_error(cpp, function):
    x, y = (values((2, 3, 4, 4), torch.float32).requires_grad_() for _ in range(2))
    with fastkd.use_backend("cpp"):
        first = torch.autograd.grad(SCALARS[function](fastkd, x, y), x, create_graph=True)
        again = torch.autograd.grad(SCALARS[function](fastkd, x, y), x)
    assert torch.equal(first[0], again[0])
