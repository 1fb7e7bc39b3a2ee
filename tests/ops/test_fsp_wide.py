"""FSP of many channels, on processors with AMX and without."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from fsp_cases import DISTANCES, matrix_check
from support import arrange, check_loss, evaluate, make, name, ref, values

import fastkd
from fastkd import native

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[True, False], ids=["amx", "without amx"])
def amx(request, cpp):
    """AMX, where it is, and the way of other processors."""
    before = native.amx()
    if request.param and not before:
        pytest.skip("no AMX here")
    native.set_amx(request.param)
    yield request.param
    native.set_amx(before)


WIDE = {
    "equal": ((70, 9, 9), (33, 9, 9)),
    "even windows": ((64, 16, 16), (130, 8, 8), (48, 4, 4)),
    "odd lines": ((33, 14, 10), (96, 7, 5), (17, 7, 5)),
    "several blocks": ((96, 32, 64), (64, 32, 64), (40, 16, 32)),
    "many channels": ((320, 6, 6), (700, 3, 3)),
    "other windows": ((48, 9, 9), (40, 3, 3), (33, 7, 7)),
    "slices": ((40, 2, 6, 10), (24, 2, 3, 5)),
}


@pytest.mark.parametrize(
    "layouts", list(itertools.product(["contiguous", "channels_last"], repeat=2)), ids=name
)
@pytest.mark.parametrize("shapes", WIDE)
def test_wide_bfloat16_matches_the_reference(amx, shapes, layouts):
    """Whole and broken tiles, averages over 2 x 2 (also of lines shorter than a tile) and others; student and
    teacher in any layout.
    """
    student, teacher = (
        [make((2, *shape), torch.bfloat16, layout, "relu") for shape in WIDE[shapes]] for layout in layouts
    )
    check_loss(
        "cpp",
        "fsp_loss",
        student,
        teacher,
        distance=random.choice(DISTANCES),
        pool_mode=random.choice(("avg", "avg", "max")),
    )
    if shapes != "several blocks":
        matrix_check("cpp", student[0], teacher[1])
    pairs = [[x, x.clone()] for x in student]
    with fastkd.use_backend("cpp"):
        same = evaluate(lambda *x: fastkd.fsp_loss(x[0::2], x[1::2]), list(itertools.chain(*pairs)))
    assert same.output == 0 and all((g == 0).all() for g in same.grads)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_infinite_gradient_of_wide_bfloat16_stays_infinite(amx, layout):
    """Split in two parts, it must not leave a NaN."""
    a, b = (make((1, 32, 6, 6), torch.bfloat16, layout, "positive") for _ in range(2))
    upstream = torch.ones(1, 32, 32)
    upstream[0, 3, 5] = math.inf
    with fastkd.use_backend("cpp"):
        grads = evaluate(fastkd.fsp_matrix, [a, b], upstream=upstream).grads
    for grad, channel in zip(grads, (3, 5)):
        assert (grad[:, channel] == math.inf).all()
        assert grad.isfinite().sum() == grad.numel() - grad[:, channel].numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_close_wide_features_keep_their_relative_accuracy(amx, layout):
    """As below, of maps wide enough for AMX: neither the split gradient nor the sums of both chains in one
    may cost digits.
    """
    t = [values((2, c, s, s), torch.float32, "relu") for c, s in ((32, 32), (64, 16), (128, 8))]
    s = [arrange((x + 1e-2 * torch.randn_like(x)).to(torch.bfloat16), layout) for x in t]
    t = [arrange(x.to(torch.bfloat16), layout) for x in t]
    with fastkd.use_backend("cpp"):
        ours = evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), [*s, *t])
    exact = evaluate(lambda *x: ref.fsp_loss(x[:3], x[3:]), [x.double() for x in (*s, *t)])
    assert abs(ours.output.double() / exact.output - 1) < 1e-6
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < 2e-3  # the rounding of the result alone is 1.7e-3
