"""FSP pairs of few positions and many channels in Triton: products over channels in place of a matrix larger
than the features.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support import LAYOUTS, arrange, check_loss, dtypes, evaluate, fetched, make, missing, ref, values
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import kernels
from fastkd._bits import FSP
from fastkd.kernels.fsp.saved import saved_shape

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
PAIR = [(24, 3, 3), (40, 3, 3)]
CHAINS = {
    "pair": PAIR,
    "after a matrix": [(6, 5, 4), *PAIR],  # no window divides 5 by 3
    "before a matrix": [*PAIR, (3, 3, 3)],
    # a middle stage with a term on each grid, this kind on the coarser
    "fused windows": [(3, 6, 6), (24, 6, 2), (80, 3, 2)],
    "fine grid": [(24, 2, 4), (40, 2, 4), (6, 1, 4)],  # or on the finer
    "two": [(40, 2, 3), (30, 2, 3), (24, 2, 2)],
    "one position": [(3, 1, 1), (5, 1, 1)],
    "several tiles": [(86, 7, 5), (88, 7, 5)],
    "several parts": [(300, 2), (17, 2), (260, 2)],
    "in three dimensions": [(30, 2, 2, 3), (40, 2, 2, 1)],
}
# else all of them
WIDE = {"after a matrix": [1], "before a matrix": [0], "fine grid": [0], "fused windows": [1]}


def chain(of, dtype=torch.float32, layout="contiguous", n=2):
    return [make((n, *shape), dtype, layout) for shape in CHAINS[of]]


@pytest.mark.parametrize("of", [of for of in CHAINS if "several" not in of])
def test_a_matrix_larger_than_the_features_is_not_kept(triton, of):
    s, t = ([triton(x).requires_grad_(not i) for x in chain(of)] for i in (0, 1))
    loss = fastkd.fsp_loss(s, t)
    kept = loss.grad_fn.saved_tensors[: len(s) - 1]
    assert [i for i, x in enumerate(kept) if x.dim() == 4] == WIDE.get(of, list(range(len(kept))))
    for i, x in enumerate(kept):
        assert x.numel() <= sum(y.numel() for y in (*s[i : i + 2], *t[i : i + 2]))


def test_what_is_kept_follows_from_sizes():
    def kept(a, b, *teacher, distance="squared"):
        chains = [
            [torch.empty(1, *shape, device="meta") for shape in pair] for pair in ((a, b), teacher or (a, b))
        ]
        return saved_shape(*chains, distance)[1:]

    assert kept((1024, 14, 14), (2048, 7, 7)) == (6, 49, 49)  # ResNet-50
    assert kept((512, 28, 28), (1024, 14, 14)) == (512, 1024)
    assert kept((128, 16, 16), (256, 8, 8)) == (128, 256)  # ResNet-32x4
    assert kept((1024, 14, 14), (2048, 7, 7), distance="column_l2") == (2048,)
    assert kept((1024, 14, 14), (2048, 7, 7), (1024, 16, 16), (2048, 8, 8)) == (2048,)
    assert kept((512, 28, 28), (1024, 14, 14), distance="column_l2") == (512, 1024)
    # a matrix of as many bytes as the features is kept, of one row more it is not
    assert kept((196, 7, 7), (196, 7, 7), distance="column_l2") == (196, 196)
    assert kept((197, 7, 7), (196, 7, 7), distance="column_l2") == (196,)
    with torch.device("meta"):
        half = [[torch.empty(1, c, 7, 7, dtype=torch.bfloat16) for c in (99, 98)] for _ in range(2)]
        assert saved_shape(*half, "column_l2") == (1, 98)
        half[1] = [x.float() for x in half[1]]
        assert saved_shape(*half, "column_l2") == (1, 99, 98)
    assert kept((98, 7, 7), (98, 7, 7)) == (98, 98) and kept((121, 7, 7), (121, 7, 7)) == (6, 49, 49)


@pytest.mark.parametrize("of", CHAINS)
def test_loss_matches_the_reference(of, triton):
    """Output and all gradients; dtypes, layouts and switches drawn."""
    # there is more than one tile only without bfloat16
    n, choice = (1, (torch.float32, torch.float16)) if "several" in of else (2, dtypes("triton"))
    s, t = (
        [make((n, *shape), dtype, random.choice(LAYOUTS)) for shape in CHAINS[of]]
        for dtype in random.choices(choice, k=2)
    )
    weights = [random.uniform(0.5, 2) for _ in s[1:]]
    switches = dict(
        distance=random.choice(("squared", "frobenius")),
        pair_reduce=random.choice(("sum", "mean")),
        weights=weights,
    )
    check_loss(
        "triton", "fsp_loss", s, t, upstream=torch.tensor(random.uniform(-3, 3)), weight=7.0, **switches
    )


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_tiles_wider_than_high_match_the_reference(triton, precision):
    """On tensor cores; of 35 positions two, one above the other."""
    tensors = [make((1, *shape), torch.float32) for shape in CHAINS["several tiles"] * 2]
    ours = fetched(
        evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:], precision=precision), [triton(x) for x in tensors])
    )
    exact = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [x.double() for x in tensors])
    allowed = {"tf32": 2e-3, "tf32x3": 1e-5}[precision]
    assert abs(ours.output.double() / exact.output - 1) < allowed
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < 2 * allowed


@pytest.mark.parametrize("of", ["fused windows", "after a matrix"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maxima_are_pooled_before(of, layout, triton):
    s, t = (chain(of, layout=layout) for _ in range(2))
    check_loss("triton", "fsp_loss", s, t, pool_mode="max")


@pytest.mark.parametrize(
    "needs", list(itertools.product([False, True], repeat=4))[1:], ids=lambda x: "".join("01"[n] for n in x)
)
def test_each_gradient_can_be_asked_for_alone(needs, triton):
    s, t = chain("after a matrix"), chain("after a matrix")
    check_loss("triton", "fsp_loss", s, t, needs=[needs[0], False, needs[1], False, needs[2], needs[3]])


@pytest.mark.parametrize("distance", [1e-2, 1e-4])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3", "bfloat16"])
def test_close_features_keep_their_relative_accuracy(triton, precision, distance):
    """No difference of large traces: near the teacher the loss is as near as its differences are."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    t = [values((2, *shape), torch.float32).relu() for shape in PAIR]
    s = [(x * (1 + distance * torch.randn_like(x))).to(dtype) for x in t]
    t = [x.to(dtype) for x in t]
    if not any((a != b).any() for a, b in zip(s, t)):
        pytest.skip("the two are equal in bfloat16")
    given = [triton(x) for x in (*s, *t)]
    ours = fetched(
        evaluate(
            lambda *x: fastkd.fsp_loss(
                x[:2], x[2:], precision=None if dtype == torch.bfloat16 else precision
            ),
            given,
        )
    )
    exact = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [x.double() for x in (*s, *t)])
    assert abs(ours.output.double() / exact.output - 1) < (2e-3 if precision == "tf32" else 2e-5)
    allowed = {"tf32": 4e-3, "bfloat16": 1e-2}.get(precision, 1e-4)
    for got, want in zip(ours.grads, exact.grads):
        assert (got.double() - want).norm() / want.norm() < allowed


def test_student_equal_to_teacher_has_loss_and_gradient_zero(triton):
    x = chain("after a matrix")
    got = evaluate(
        lambda *x: fastkd.fsp_loss(x[:3], x[3:]), [triton(y) for y in (*x, *(y.clone() for y in x))]
    )
    assert got.output == 0 and all((g == 0).all() for g in got.grads)


def test_a_nan_is_not_lost(triton):
    s, t = chain("pair"), chain("pair")
    s[0][1, 5, 2, 0] = torch.nan
    got = fetched(evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:]), [triton(x) for x in (*s, *t)]))
    want = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [*s, *t])
    assert got.output.isnan() and all(
        torch.equal(a.isnan(), b.isnan()) for a, b in zip(got.grads, want.grads)
    )


def test_results_are_the_same_bits_in_each_run_and_one_launch_each_way(triton, launched):
    s, t = (
        [triton(make((2, *shape))).requires_grad_(not i) for shape in ((6, 4, 2), (260, 4, 1), (20, 2, 1))]
        for i in (0, 1)
    )
    first, again = (
        [loss, *torch.autograd.grad(loss, s)] for loss in (fastkd.fsp_loss(s, t), fastkd.fsp_loss(s, t))
    )
    assert all(map(torch.equal, first, again))
    assert launched == ["fsp_loss_kernel", "fsp_loss_kernel", "fsp_gradient_kernel", "fsp_gradient_kernel"]


@pytest.mark.parametrize("layout", ["contiguous", "stepped"])
def test_offsets_within_a_large_sample_are_as_wide(triton, layout, monkeypatch):
    from fastkd.kernels.fsp import forward, gradient, view

    tensors = [triton(arrange(x, layout)) for x in (*chain("fused windows"), *chain("fused windows"))]
    results = []
    for far in (2**31, 0):
        monkeypatch.setattr(view, "FAR", far)
        for plans in (forward._plans, gradient._plans):
            plans.clear()
        result = evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), tensors)
        results.append([result.output, *result.grads])
    for plans in (forward._plans, gradient._plans):
        plans.clear()
    assert all(map(torch.equal, *results))


def test_a_teacher_may_come_from_inference_mode_but_not_change(triton):
    s, t = ([triton(x).requires_grad_(not i) for x in chain("after a matrix")] for i in (0, 1))
    with torch.inference_mode():
        frozen = [x.clone() for x in t]
    loss = fastkd.fsp_loss(s, t)
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(loss, s, retain_graph=True),
            torch.autograd.grad(fastkd.fsp_loss(s, frozen), s),
        )
    )
    t[0].zero_()  # of a pair with a matrix
    torch.autograd.grad(loss, s, retain_graph=True)
    t[2].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, s)


@pytest.mark.parametrize("of", ["after a matrix", "fused windows"])
def test_the_operator_gives_what_its_schema_says(triton, of):
    s, t = ([triton(x) for x in chain(of)] for _ in range(2))
    options = FSP.pack(
        distance="frobenius", pair_reduce="mean", precision="ieee", with_grad=True, prepare=True
    )
    args = (options, [-2.5, 3.0, 1.0, -2.0])
    got = kernels.launcher("fsp_loss")(s, t, *args)
    with FakeTensorMode() as mode:
        # a graph on a GPU, where there need be none
        chains = [
            [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in side]
            for side in (s, t)
        ]
        assert all(x.fake_mode is mode for x in chains[0])
        fake = torch.ops.fastkd.fsp_loss(*chains, *args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    leaves = [x.clone().requires_grad_() for x in s]
    loss = fastkd.fsp_loss(
        leaves, t, distance="frobenius", pair_reduce="mean", weights=[1.0, -2.0], weight=3.0
    )
    assert all(
        torch.equal(a, b) for a, b in zip(got[2], torch.autograd.grad(loss * -2.5, leaves), strict=True)
    )


def test_the_backward_operator_refuses_what_it_cannot_use(triton):
    s, t = ([triton(x) for x in chain("pair")] for _ in range(2))
    _, kept, _ = kernels.launcher("fsp_loss")(s, t, FSP.pack(with_grad=True), [0.0, 1.0])
    backward = kernels.launcher("fsp_loss_backward")
    for others, given, word in (
        ([], kept, "others"),
        (t[::-1], kept, "others"),
        (t, [kept[0][..., :4]], "matrix_grads"),
    ):
        with pytest.raises(ValueError, match=word):
            backward(s[0].new_ones(()), s, given, 0, [0], others)
