"""FSP pairs of few positions and many channels in C++: products over channels in place of the matrix."""

from __future__ import annotations

import random

import pytest
import torch
from recorder import fused_only
from support import DTYPES, LAYOUTS, check_loss, evaluate, make, name, ref, values
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import native
from fastkd._bits import FSP
from fastkd.kernels.fsp.saved import saved_shape_on_cpu
from fastkd.ops import fsp
from fastkd.ops._grad_prefetch import GradPrefetch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("cpp")]

PAIR = [(60, 3, 3), (80, 3, 3)]
CHAINS = {
    "pair": PAIR,
    "after a matrix": [(6, 5, 4), *PAIR],  # no window divides 5 by 3
    "before a matrix": [*PAIR, (3, 3, 3)],
    "both sides": [(100, 6, 6), (70, 3, 3), (61, 2, 3)],  # a middle stage with two such terms
    "windows": [(64, 8, 8), (96, 4, 4)],
    "several parts": [(300, 2, 2), (17, 2, 2), (520, 2, 2)],
    "several blocks": [(300, 8, 8), (400, 8, 8)],  # of rows of the squares, and of their depth
    "one position": [(4, 1, 1), (5, 1, 1)],
    "in three dimensions": [(50, 2, 2, 3), (140, 2, 2, 1)],
}
WIDE = {"after a matrix": [1], "before a matrix": [0]}  # the pairs without a matrix; else all


def chain(of, dtype=torch.float32, layout="contiguous", n=2):
    return [make((n, *shape), dtype, layout) for shape in CHAINS[of]]


@pytest.mark.parametrize("of", CHAINS)
def test_a_matrix_that_takes_more_products_than_its_squares_is_not_made(of, monkeypatch):
    # matrices come in one tensor beside gradients that are prepared, as a first call's are
    monkeypatch.setattr(fsp, "_prefetch", GradPrefetch())
    s, t = ([x.requires_grad_(not i) for x in chain(of)] for i in (0, 1))
    kept = fastkd.fsp_loss(s, t).grad_fn.saved_tensors[: len(s) - 1]
    assert [i for i, x in enumerate(kept) if x.dim() == 4] == WIDE.get(of, list(range(len(kept))))
    # the teacher's gradients want matrices
    kept = fastkd.fsp_loss(s, [x.requires_grad_() for x in t]).grad_fn.saved_tensors
    matrices = sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b in zip(s, s[1:]))
    assert kept[0].shape == (matrices,)
    assert len(kept) == 1 + 2 * len(s)


def test_what_is_kept_follows_from_sizes():
    def kept(a, b, *teacher, distance="squared", dtype=torch.float32, teacher_grad=False):
        chains = [
            [torch.empty(1, *shape, device="meta", dtype=dtype) for shape in pair]
            for pair in ((a, b), teacher or (a, b))
        ]
        return saved_shape_on_cpu(*chains, distance, teacher_grad)[1:]

    assert kept((1024, 14, 14), (2048, 7, 7)) == (4, 49, 49)  # ResNet-50
    assert kept((512, 28, 28), (1024, 14, 14)) == (4, 196, 196)
    assert kept((1024, 14, 14), (2048, 7, 7), teacher_grad=True) == (1024, 2048)
    assert kept((256, 56, 56), (512, 28, 28)) == (256, 512)
    assert kept((128, 16, 16), (256, 8, 8)) == (128, 256)  # ResNet-32x4
    assert kept((1024, 14, 14), (2048, 7, 7), distance="column_l2") == (1024, 2048)
    assert kept((1024, 14, 14), (2048, 7, 7), dtype=torch.bfloat16) == (4, 49, 49)
    assert kept((1024, 14, 14), (2048, 7, 7), (1024, 16, 16), (2048, 8, 8)) == (1024, 2048)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", CHAINS)
def test_loss_matches_the_reference(of, layout, dtype):
    """Output and all gradients; the teacher's layout and the switches drawn."""
    s, t = chain(of, dtype, layout), chain(of, random.choice((torch.float32, dtype)), random.choice(LAYOUTS))
    check_loss(
        "cpp",
        "fsp_loss",
        s,
        t,
        upstream=torch.tensor(random.uniform(-3, 3)),
        weight=7.0,
        distance=random.choice(("squared", "frobenius")),
        pair_reduce=random.choice(("sum", "mean")),
        pool_mode=random.choice(("avg", "max")),
        weights=[random.uniform(0.5, 2) for _ in s[1:]],
        needs=[True] * len(s) + [False] * len(t),
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_gradients_match_the_reference(layout, memory_plan):
    """By ordinary stores, and past the caches, where they are one term's and lie well."""
    s, t = ([make((16, c, 4, 4), torch.float32, layout, "relu") for c in (1024, 1040)] for _ in range(2))
    found = []
    for plan in native.MEMORY_PLANS:
        memory_plan(plan)
        found.append(check_loss("cpp", "fsp_loss", s, t, needs=[True, True, False, False]).grads[:2])
    assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other))


@pytest.mark.parametrize(
    "needs", [(1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 1, 1)], ids=str
)
def test_each_gradient_can_be_asked_for_alone(needs):
    s, t = chain("after a matrix"), chain("after a matrix")
    check_loss("cpp", "fsp_loss", s, t, needs=[False, *map(bool, needs[:2]), False, *map(bool, needs[2:])])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_close_features_keep_their_relative_accuracy(distance, layout):
    # averages are rounded before they are subtracted: none here
    t = [values((2, *shape), torch.float32).relu() for shape in CHAINS["several blocks"]]
    s = [x * (1 + distance * torch.randn_like(x)) for x in t]
    needs = [True, True, False, False]
    ours = evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:]), [*s, *t], needs)
    exact = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [x.double() for x in (*s, *t)], needs)
    assert abs(ours.output.double() / exact.output - 1) < 2e-6
    for got, want in zip(ours.grads[:2], exact.grads):
        assert (got.double() - want).norm() / want.norm() < 2e-6


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_student_of_another_size_keeps_its_accuracy(factor):
    """One that is small beside its teacher: no gradient is what is left of the teacher's own products."""
    shapes = CHAINS["several blocks"]
    s, t = ([values((2, *shape), torch.float32).relu() for shape in shapes] for _ in range(2))
    tensors, needs = [*[factor * x for x in s], *t], [True, True, False, False]
    ours = evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:]), tensors, needs)
    exact = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [x.double() for x in tensors], needs)
    assert abs(ours.output.double() / exact.output - 1) < 2e-6
    for got, want in zip(ours.grads[:2], exact.grads):
        assert (got.double() - want).norm() / want.norm() < 2e-6


def test_a_loss_of_two_factors_that_cancel_is_not_negative():
    """A network whose stages are rescaled has its teacher's matrix from other features: what is left is a
    rounding of the matrix's square.
    """
    for _ in range(20):
        a, b = (values((1, 64, 1, 1), torch.float32) for _ in range(2))
        loss = fastkd.fsp_loss([3 * a, b / 3], [a, b])
        matrix = ref.fsp_loss([a, b], [torch.zeros_like(a), b])
        assert 0 <= loss <= 1e-6 * matrix


def test_student_equal_to_teacher_has_loss_and_gradient_zero():
    x = chain("after a matrix")
    given = [*x, *(y.clone() for y in x)]
    got = evaluate(lambda *x: fastkd.fsp_loss(x[:3], x[3:]), given, [True] * 3 + [False] * 3)
    assert got.output == 0 and all((g == 0).all() for g in got.grads[:3])


def test_a_nan_is_not_lost_and_stays_in_its_sample():
    s, t = chain("pair", n=3), chain("pair", n=3)
    s[0][1, 5, 2, 0] = torch.nan
    needs = [True, True, False, False]
    got = evaluate(lambda *x: fastkd.fsp_loss(x[:2], x[2:]), [*s, *t], needs)
    want = evaluate(lambda *x: ref.fsp_loss(x[:2], x[2:]), [*s, *t], needs)
    assert got.output.isnan()
    assert all((a.isnan() >= b.isnan()).all() for a, b in zip(got.grads[:2], want.grads))
    assert all(a[[0, 2]].isfinite().all() for a in got.grads[:2])


@pytest.mark.parametrize("n", [3, 16], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("of", ["after a matrix", "both sides"])
def test_prepared_gradients_are_those_of_the_backward_to_the_bit_on_any_threads(of, layout, n, monkeypatch):
    s, t = ([x.requires_grad_(not i) for x in chain(of, layout=layout, n=n)] for i in (0, 1))
    results, upstream = [], torch.tensor(0.75)
    for expected, calls, threads in ((0.75, 1, 1), (None, 2, 1), (0.75, 1, 2), (1.0, 2, 2)):
        guess = GradPrefetch()
        monkeypatch.setattr(guess, "expect", lambda value=expected: ((0, 0.0), value))
        monkeypatch.setattr(fsp, "_prefetch", guess)
        torch.set_num_threads(threads)
        with fused_only() as seen:
            loss = fastkd.fsp_loss(s, t, weight=3.0)
            results.append([loss.detach(), *torch.autograd.grad(loss, s, upstream)])
        assert len(seen.fused) == calls
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_layouts_give_the_same_bits():
    s, t = chain("after a matrix"), chain("after a matrix")
    results = [
        evaluate(
            lambda *x: fastkd.fsp_loss(x[1:3], x[4:]),
            [x.contiguous(memory_format=form) for x in (*s, *t)],
            [False, True, True, False, False, False],
        )
        for form in (torch.contiguous_format, torch.channels_last)
    ]
    for a, b in zip(*[[r.output, *r.grads] for r in results]):
        assert a is b is None or torch.equal(a, b)


def test_a_teacher_may_come_from_inference_mode_but_not_change():
    s, t = ([x.requires_grad_(not i) for x in chain("after a matrix")] for i in (0, 1))
    with torch.inference_mode():
        frozen = [x.clone() for x in t]
    loss, two = fastkd.fsp_loss(s, t), torch.tensor(2.0)  # not what is prepared for
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(loss, s, two, retain_graph=True),
            torch.autograd.grad(fastkd.fsp_loss(s, frozen), s, two),
        )
    )
    t[0].zero_()  # of a pair with a matrix
    torch.autograd.grad(loss, s, two, retain_graph=True)
    t[2].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, s, two)


@pytest.mark.parametrize("of", ["after a matrix", "both sides"])
def test_the_operator_gives_what_its_schema_says(of):
    s, t = chain(of), chain(of)
    args = (FSP.pack(distance="frobenius", with_grad=True, prepare=True), [-2.5, 3.0])
    got = torch.ops.fastkd.fsp_loss(s, t, *args)
    with FakeTensorMode() as mode:
        fake = torch.ops.fastkd.fsp_loss(*([mode.from_tensor(x) for x in side] for side in (s, t)), *args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(fake), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_the_backward_operator_refuses_what_it_cannot_use():
    s, t = chain("pair"), chain("pair")
    _, kept, _ = torch.ops.fastkd.fsp_loss(s, t, FSP.pack(with_grad=True), [0.0, 1.0])
    for others, given, word in (
        ([], kept, "others"),
        ([*t, t[0]], kept, "others"),
        (t[::-1], kept, "others"),
        (t, [kept[0][..., :4]], "matrix_grads"),
    ):
        with pytest.raises(RuntimeError, match=word):
            torch.ops.fastkd.fsp_loss_backward(s[0].new_ones(()), s, given, 0, [0], others)
    with pytest.raises(RuntimeError, match="teacher_grad"):
        negate = FSP.pack(negate=True)
        torch.ops.fastkd.fsp_loss_backward(s[0].new_ones(()), t, kept, negate, [0], s)
