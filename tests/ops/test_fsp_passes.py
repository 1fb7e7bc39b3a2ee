"""FSP losses in several passes: one call, the same bits, gradients of their own."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from fsp_cases import DISTANCES, SUMS
from fsp_columns import column_gradient_terms
from recorder import fused_only
from support import DTYPES, KERNELS, check, check_loss, evaluate, make, name, ref

import fastkd
from fastkd.ops import fsp
from fastkd.ops._grad_prefetch import GradPrefetch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def upstream_guess(monkeypatch):
    """A guess of the upstream gradient that no other test has touched; call it to set what is expected."""

    def expect(value: float | None) -> None:
        guess = GradPrefetch()  # of its own it expects 1
        if value != 1.0:
            guess.expect = lambda: ((0, 0.0), value)
        monkeypatch.setattr(fsp, "_prefetch", guess)

    expect(1.0)
    return expect


def chain(
    n: int = 3, dtype: torch.dtype = torch.float32, layout: str = "contiguous", count: int = 4
) -> list[torch.Tensor]:
    sizes = (6, 9, 9), (7, 9, 9), (5, 4, 4), (6, 4, 4)
    return [make((n, *shape), dtype, layout) for shape in sizes[:count]]


def test_all_pairs_go_through_one_call_in_each_direction(cpp, upstream_guess):
    student, teacher = chain(), chain()
    for value, calls in (
        (torch.tensor(1.0), ["fsp_loss"]),
        (torch.tensor(2.0), ["fsp_loss", "fsp_loss_backward"]),
    ):
        with fastkd.use_backend("cpp"), fused_only() as seen:
            evaluate(
                lambda *x: fastkd.fsp_loss(x[:4], x[4:]),
                [*student, *teacher],
                [True] * 4 + [False] * 4,
                value,
            )
        assert seen.fused == calls


@pytest.mark.parametrize(
    "needs", [(True,) * 8, (True,) * 4 + (False,) * 4, (False, True, False, True) + (False,) * 4], ids=name
)
@pytest.mark.parametrize("n", [3, 64], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_made_in_the_forward_are_those_of_the_backward_to_the_bit(
    cpp, dtype, layout, n, needs, upstream_guess
):
    tensors, value = [*chain(n, dtype, layout), *chain(n, dtype)], torch.tensor(0.75)
    pool_mode = random.choice(("avg", "max"))

    def gradients(expected: float | None) -> tuple[list, list]:
        upstream_guess(expected)
        with fastkd.use_backend("cpp"), fused_only() as seen:
            result = evaluate(
                lambda *x: fastkd.fsp_loss(x[:4], x[4:], pool_mode=pool_mode, weight=3.0),
                tensors,
                needs,
                value,
            )
        return [result.output, *(g for g in result.grads if g is not None)], seen.fused

    # the gradients of a student that needs some of them only are left to the backward pass
    sides = any(needs[:4]) + any(needs[4:])
    made, calls = gradients(0.75)
    assert calls == ["fsp_loss"] + ["fsp_loss_backward"] * (sides - all(needs[:4]))
    for expected in (None, 1.0, -0.75):
        computed, calls = gradients(expected)
        assert calls == ["fsp_loss"] + ["fsp_loss_backward"] * sides
        assert all(map(torch.equal, made, computed))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name)
def test_large_gradients_match_the_reference(cpp, dtype, layout):
    """Gradients of a mebibyte and more are written past the caches: of one term, of a pooled and a direct
    one, of two direct ones.
    """
    sizes = (16, 32, 32), (16, 32, 32), (17, 32, 32), (32, 16, 16)
    student, teacher = ([make((16, *shape), dtype, layout, "relu") for shape in sizes] for _ in range(2))
    check_loss("cpp", "fsp_loss", student, teacher, needs=[True] * 4 + [False] * 4)


@pytest.mark.parametrize("n", [3, 4, 17], ids=name)
def test_samples_and_passes_give_the_same_bits(cpp, n):
    """Three samples on two threads are done pass by pass, three on one thread or four on two sample by
    sample.
    """
    tensors = [*chain(n), *chain(n)]
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        with fastkd.use_backend("cpp"):
            result = evaluate(lambda *x: fastkd.fsp_loss(x[:4], x[4:]), tensors)
        results.append([result.output, *result.grads])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_a_second_backward_pass_gets_gradients_of_its_own(cpp, upstream_guess):
    student, teacher = [x.requires_grad_() for x in chain()], chain()
    with fastkd.use_backend("cpp"):
        loss = fastkd.fsp_loss(student, teacher)
        first = torch.autograd.grad(loss, student, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, student, retain_graph=True)
        assert all(map(torch.equal, second, kept))
        assert not {g.data_ptr() for g in first} & {g.data_ptr() for g in second}
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(student, kept))


def test_the_guess_follows_a_steady_upstream_gradient(cpp, upstream_guess):
    student, teacher = chain(), chain()
    calls = []
    for value in map(torch.tensor, (8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0)):
        with fastkd.use_backend("cpp"), fused_only() as seen:
            evaluate(lambda *x: fastkd.fsp_loss(x, teacher), student, upstream=value)
        calls.append(len(seen.fused))
    # after a change twice the same is asked for, since what followed a 1 before was an 8
    assert calls == [2, 2, 1, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("shape", [(4, 16, 16, 16), (4, 16, 8, 8)], ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_tensor_twice_has_the_whole_gradient(backend, shape):
    if backend == "triton" and not torch.cuda.is_available():  # interpreted, a product takes long
        shape = (1, 5, *shape[2:])
    x, y = make(shape), make((*shape[:2], 16, 16))
    for distance, (student, teacher) in itertools.product(DISTANCES, (("xx", "yy"), ("xyx", "yxy"))):

        def loss(module):
            return lambda *of: module.fsp_loss(
                *([of["xy".index(name)] for name in side] for side in (student, teacher)), distance=distance
            )

        terms = None
        if distance == "column_l2":
            names = student + teacher
            chains = ([{"x": x, "y": y}[name] for name in side] for side in (student, teacher))
            each = column_gradient_terms(*chains)
            terms = [sum(g for g, name in zip(each, names) if name == wanted) for wanted in "xy"]
        check(backend, loss(fastkd), loss(ref), [x, y], k=8, also=SUMS, gradient_terms=terms)
