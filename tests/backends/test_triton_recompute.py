"""FSP pairs whose matrix, larger than the features, Triton makes once in each pass and keeps in neither
(`fsp/saved.py` says where).
"""

from __future__ import annotations

import random

import pytest
import torch
from support import LAYOUTS, check_loss, dtypes, evaluate, fetched, make, missing, ref, values
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import kernels
from fastkd._bits import FSP

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
PAIR = [(40, 3, 3), (50, 3, 3)]
SMALLER = [(40, 2, 2), (50, 2, 2)]
# the distance; the student's stages; the teacher's, where they have other sizes
CHAINS = {
    "columns": ("column_l2", PAIR, PAIR),
    "columns after a matrix": ("column_l2", [(6, 5, 4), *PAIR], [(6, 5, 4), *PAIR]),
    "columns, smaller teacher": ("column_l2", PAIR, SMALLER),
    "columns, fused windows": (
        "column_l2",
        [(3, 6, 6), (24, 6, 2), (80, 3, 2)],
        [(3, 6, 6), (24, 6, 2), (80, 3, 2)],
    ),
    "smaller teacher": ("squared", PAIR, SMALLER),
    "larger teacher before a matrix": ("frobenius", [*SMALLER, (3, 2, 2)], [*PAIR, (3, 3, 3)]),
    "fine grid": ("squared", [(24, 2, 4), (60, 2, 4), (6, 1, 4)], [(24, 2, 2), (60, 2, 2), (6, 2, 2)]),
    "one position": ("squared", [(9, 1, 1), (15, 1, 1)], [(9, 2, 1), (15, 2, 1)]),
    "two": ("column_l2", [(40, 2, 3), (30, 2, 3), (24, 2, 2)], [(40, 4, 2), (30, 2, 2), (24, 1, 2)]),
    "several tiles": ("column_l2", [(131, 7), (70, 7)], [(131, 5), (70, 5)]),
    "several steps": ("squared", [(70, 19), (150, 19)], [(70, 18), (150, 18)]),
}
KEPT = {
    "columns after a matrix": [3, 2],
    "columns, fused windows": [3, 2],
    "larger teacher before a matrix": [2, 3],
    "fine grid": [2, 3],
    "two": [2, 2],
}  # dimensions of what is kept in float32; else [2]


def chains(of, dtypes=(torch.float32, torch.float32), layouts=("contiguous",), n=2):
    return [
        [make((n, *shape), dtype, random.choice(layouts)) for shape in side]
        for side, dtype in zip(CHAINS[of][1:], dtypes)
    ]


@pytest.mark.parametrize("of", [of for of in CHAINS if "several" not in of])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_larger_than_the_features_is_not_kept(of, dtype, triton):
    s, t = (
        [triton(x).requires_grad_(not i) for x in side] for i, side in enumerate(chains(of, (dtype, dtype)))
    )
    loss = fastkd.fsp_loss(s, t, distance=CHAINS[of][0])
    kept = loss.grad_fn.saved_tensors[: len(s) - 1]
    if dtype == torch.float32:
        assert [x.dim() for x in kept] == KEPT.get(of, [2])
    for i, x in enumerate(kept):
        assert x.nbytes <= sum(y.nbytes for y in (*s[i : i + 2], *t[i : i + 2]))


@pytest.mark.parametrize("of", CHAINS)
def test_loss_matches_the_reference(of, triton):
    """Output and all gradients; dtypes, layouts and switches drawn."""
    s, t = chains(of, random.choices(dtypes("triton"), k=2), LAYOUTS, 1 if "several" in of else 2)
    weights = [random.uniform(0.5, 2) for _ in s[1:]]
    switches = dict(distance=CHAINS[of][0], pair_reduce=random.choice(("sum", "mean")), weights=weights)
    check_loss(
        "triton", "fsp_loss", s, t, upstream=torch.tensor(random.uniform(-3, 3)), weight=7.0, **switches
    )


@pytest.mark.parametrize("of", ["columns, fused windows", "two"])
def test_maxima_are_pooled_before(of, triton):
    check_loss("triton", "fsp_loss", *chains(of), pool_mode="max", distance=CHAINS[of][0])


@pytest.mark.parametrize("needs", [(i,) for i in range(4)] + [(1, 2), (0, 3)])
def test_gradients_can_be_asked_for_one_by_one(needs, triton):
    check_loss("triton", "fsp_loss", *chains("smaller teacher"), needs=[i in needs for i in range(4)])


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_close_features_keep_their_relative_accuracy(triton, precision):
    """Differences are made before products, in the backward pass too."""
    t = [values((2, *shape), torch.float32).relu() for shape in PAIR]
    s = [x * (1 + 1e-2 * torch.randn_like(x)) for x in t]
    given = [triton(x) for x in (*s, *t)]
    ours = fetched(
        evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:], distance="column_l2", precision=precision), given)
    )
    exact = evaluate(
        lambda *x: ref.fsp_loss(x[:2], x[2:], distance="column_l2"), [x.double() for x in (*s, *t)]
    )
    assert abs(ours.output.double() / exact.output - 1) < (2e-3 if precision == "tf32" else 2e-5)
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < (4e-3 if precision == "tf32" else 1e-4)


def test_columns_that_do_not_differ_have_gradient_zero(triton):
    s, t = chains("columns")
    t[0], t[1] = s[0].clone(), s[1].clone()
    t[1][:, 7:] += 1  # of the second feature's channels, the columns
    got = check_loss("triton", "fsp_loss", s, t, distance="column_l2")
    assert (got.grads[1][:, :7] == 0).all() and (got.grads[1][:, 7:] != 0).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("of", ["columns", "smaller teacher"])
def test_what_is_not_finite_is_as_in_the_reference(of, value, triton):
    s, t = ([x.abs() for x in side] for side in chains(of))
    s[0][1, 5, 1, 0] = value
    got = fetched(
        evaluate(
            lambda *x: fastkd.fsp_loss(x[:2], x[2:], distance=CHAINS[of][0]), [triton(x) for x in (*s, *t)]
        )
    )
    want = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:], distance=CHAINS[of][0]), [*s, *t])
    assert torch.equal(got.output.isnan(), want.output.isnan()) and not got.output.isfinite()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(got.grads, want.grads))


def test_results_are_the_same_bits_in_each_run_and_one_launch_each_way(triton, launched):
    s, t = (
        [triton(x).requires_grad_(not i) for x in side]
        for i, side in enumerate(chains("columns, smaller teacher"))
    )
    first, again = (
        [loss, *torch.autograd.grad(loss, s)] for loss in (fastkd.fsp_loss(s, t), fastkd.fsp_loss(s, t))
    )
    assert all(map(torch.equal, first, again))
    assert launched == ["fsp_loss_kernel", "fsp_loss_kernel", "fsp_gradient_kernel", "fsp_gradient_kernel"]


@pytest.mark.parametrize("of", ["columns after a matrix", "fine grid"])
def test_the_operator_gives_what_its_schema_says(triton, of):
    s, t = ([triton(x) for x in side] for side in chains(of))
    options = FSP.pack(
        distance=CHAINS[of][0], pair_reduce="mean", precision="ieee", with_grad=True, prepare=True
    )
    args = (options, [-2.5, 3.0, 1.0, -2.0])
    got = kernels.launcher("fsp_loss")(s, t, *args)
    with FakeTensorMode():
        # a graph on a GPU, where there need be none
        fakes = [
            [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in side]
            for side in (s, t)
        ]
        fake = torch.ops.fastkd.fsp_loss(*fakes, *args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    leaves = [x.clone().requires_grad_() for x in s]
    loss = fastkd.fsp_loss(
        leaves, t, distance=CHAINS[of][0], pair_reduce="mean", weights=[1.0, -2.0], weight=3.0
    )
    assert all(
        torch.equal(a, b) for a, b in zip(got[2], torch.autograd.grad(loss * -2.5, leaves), strict=True)
    )


def test_the_backward_operator_refuses_what_it_cannot_use(triton):
    s, t = ([triton(x) for x in side] for side in chains("smaller teacher"))
    _, kept, _ = kernels.launcher("fsp_loss")(s, t, FSP.pack(with_grad=True), [0.0, 1.0])
    backward = kernels.launcher("fsp_loss_backward")
    for others, given, word in (
        ([], kept, "others"),
        (t[::-1], kept, "others"),
        (t, [kept[0][:, :4]], "matrix_grads"),
    ):
        with pytest.raises(ValueError, match=word):
            backward(s[0].new_ones(()), s, given, 0, [0], others)
