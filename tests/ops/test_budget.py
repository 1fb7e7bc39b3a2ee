"""What the tests themselves call equal: infinities, and gradients of columns that hardly differ."""

from __future__ import annotations

import math

import pytest
import torch
from fsp_columns import column_gradient_terms
from support import HALF, name, ref, values, within_budget

LARGEST = {torch.float16: 65504.0, torch.bfloat16: 2.0**128 - 2.0**120, torch.float32: 2.0**128 - 2.0**104}
# half the distance to the number that would follow
HALF_ULP = {torch.float16: 16.0, torch.bfloat16: 2.0**119, torch.float32: 2.0**103}


def passes(got: float, exact: float, dtype: torch.dtype, rough: float = 0.0) -> bool:
    try:
        # beside a small number, whose budget is the same
        out, right = (torch.tensor([x, 1.0], dtype=torch.float64) for x in (got, exact))
        within_budget("this", out.to(dtype), right, rough)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", LARGEST, ids=name)
def test_infinity_is_right_just_where_the_exact_number_rounds_to_it(dtype, sign):
    top, half = sign * LARGEST[dtype], sign * HALF_ULP[dtype]
    beyond, limit = sign * math.inf, top + half
    assert passes(beyond, 1.5 * limit, dtype) and not passes(top, 1.5 * limit, dtype)
    assert not passes(-beyond, 1.5 * limit, dtype) and not passes(math.nan, 1.5 * limit, dtype)
    for exact in (0.0, sign * 1.0, 0.5 * top):
        assert not passes(beyond, exact, dtype) and not passes(-beyond, exact, dtype)
    assert not passes(-beyond, limit, dtype)
    # a number that is off by rough before it is rounded may lie on either side
    for exact in (limit, limit + 0.5 * half, limit - 0.5 * half):
        assert passes(beyond, exact, dtype, abs(half)) and passes(top, exact, dtype, abs(half))
    if dtype in HALF:  # of float32 the budget alone reaches as far
        assert passes(top, top + 0.9 * half, dtype) and not passes(beyond, top + 0.9 * half, dtype)
        assert passes(beyond, top + 1.1 * half, dtype) and not passes(top, top + 1.1 * half, dtype)
        assert passes(beyond, limit, dtype) and passes(top, limit, dtype)


def test_a_budget_without_end_is_refused():
    with pytest.raises(AssertionError, match="eager code overflows"):
        within_budget("this", torch.ones(3), torch.ones(3, dtype=torch.float64), math.inf)


@pytest.mark.parametrize("of", ["one size", "smaller teacher", "averages", "maxima"])
def test_what_rounding_makes_of_columns_is_as_large_as_said(of):
    """Products of the matrices moved by up to u, for the columns and, apart from them, for their norms."""
    u, pool_mode = 1e-9, "max" if of == "maxima" else "avg"
    sizes = {  # of the student's features, then the teacher's
        "one size": [(4, 3)] * 4,
        "smaller teacher": [(4, 3), (4, 3), (2, 3), (2, 3)],
    }.get(of, [(4, 3), (2, 3)] * 2)
    features = [values((2, c, *size), torch.float64, "positive") for c, size in zip((6, 5, 6, 5), sizes)]
    s, t = features[:2], features[2:]
    s[0], t[0] = (x[:, :1].expand(x.shape) for x in (s[0], t[0]))  # all rows equal: columns near zero
    switches = dict(pool_mode=pool_mode, pair_reduce="mean", weights=[-1.5], weight=3.0)
    terms = column_gradient_terms(s, t, torch.tensor(-2.0), **switches)
    leaves = [x.clone().requires_grad_() for x in (*s, *t)]
    grams = [ref.fsp_matrix(*leaves[i : i + 2], pool_mode=pool_mode) for i in (0, 2)]
    products = [s, t]
    if of == "one size":
        products = [[(s[0] - t[0]).abs(), s[1]], [t[0], (s[1] - t[1]).abs()]]
    size = sum(ref.fsp_matrix(*pair, pool_mode=pool_mode) for pair in products)
    d = (grams[0] - grams[1]).detach()

    def moved(sign):
        return d + sign * u * size * torch.rand_like(d)

    def gradients(d, norm):
        y = -2.0 * -1.5 * 3.0 / 2 * d / norm.norm(dim=1, keepdim=True)
        return torch.autograd.grad(grams, leaves, [y, -y], retain_graph=True)

    exact = gradients(d, d)
    loss = ref.fsp_loss(leaves[:2], leaves[2:], distance="column_l2", **switches)
    torch.testing.assert_close(exact, torch.autograd.grad(loss * -2.0, leaves), rtol=1e-9, atol=1e-12)
    most = 0.0
    for sign in (1, -1) * 8:
        for got, want, term in zip(gradients(moved(sign), moved(-sign)), exact, terms):
            assert ((got - want).abs() <= 1.01 * u * term).all()
            most = max(most, ((got - want).abs().max() / (u * term.max())).item())
    assert most > 0.1, f"{most} of the budget"
