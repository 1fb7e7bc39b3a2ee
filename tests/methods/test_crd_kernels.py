"""CRD's kernels on a CPU: every code path against float64, the same bits whatever the threads, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from crd_cases import by_hand, case, unit

import fastkd
from fastkd import reference


def gradients(loss, student, teacher, *rest, **options):
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    out, normalizers = loss(*leaves, *rest, **options)
    return [out, normalizers, *torch.autograd.grad(out, leaves)]


def single(tensors):
    return [x.float() if x.is_floating_point() else x for x in tensors]


# (images, negatives, rows of a bank, width): one tile and several, vectors that are full and not, no vector;
# more scores of an image in a tile than the buffer holds, and more images than it tells apart
CASES = [(1, 1, 2, 1), (3, 17, 50, 37), (7, 300, 1000, 128), (5, 1500, 9000, 60), (16, 70, 20_000, 128)]
CASES += [(3, 1300, 40, 20), (150, 3, 60, 16)]


@pytest.mark.parametrize("normalizers", [None, (900.0, 0.0)], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_kernels_match_float64_on_every_code_path(each_path, sizes, normalizers):
    n, k, size, width = sizes
    tensors = case(n, k, size, width, seed=k)
    options = {"weight": 0.7, "temperature": 0.1, "eps": 1e-3, "normalizers": normalizers}
    exact = gradients(reference.crd_loss, *tensors, **options)
    for _ in each_path:
        found = gradients(fastkd.crd_loss, *single(tensors), **options)
        assert all(x.dtype == torch.float32 for x in found)
        slope = options["weight"] / options["temperature"] / n  # of one row: gradients are sums of such
        for got, want, least in zip(found, exact, (0, 0, slope, slope), strict=True):
            largest = max(want.abs().max().item(), least)
            torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * largest)


def test_the_kernels_match_the_published_form_by_hand(each_path):
    tensors = case(3, 40, size=70, width=21, seed=5)
    wanted = gradients(by_hand, *tensors)
    for _ in each_path:
        found = gradients(fastkd.crd_loss, *single(tensors))
        torch.testing.assert_close([x.double() for x in found], wanted, rtol=1e-5, atol=1e-6)


def test_exponentials_and_logarithms_over_all_of_floats_range(each_path):
    """One negative, whose u = e^score here, and a positive that adds nothing: loss and gradient are
    log(1 + u) and u / (1 + u), to a relative error of some roundings.
    """
    scores = [*torch.linspace(-70, 88.5, 101).tolist(), -1e-6, 1e-6]
    x, rows = torch.ones(1, 1), torch.tensor([[0, 1]])
    for _ in each_path:
        for score in scores:
            bank = torch.tensor([[88.0], [score]])
            found, exact = (
                gradients(loss, a, a, b, b, rows, temperature=1.0, normalizers=(2.0, 2.0), eps=0.0)
                for loss, a, b in (
                    (fastkd.crd_loss, x, bank),
                    (reference.crd_loss, x.double(), bank.double()),
                )
            )
            torch.testing.assert_close([y.double() for y in found], exact, rtol=5e-7, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 100.0], ids=str)
def test_what_is_no_number_or_too_large_comes_out_as_in_plain_pytorch(each_path, value):
    tensors = case(2, 40, size=50, width=16, dtype=torch.float32)
    with fastkd.use_backend("reference"):
        calm = gradients(fastkd.crd_loss, *tensors, normalizers=(40.0, 40.0))
    row = int(tensors[4][1, 7])
    tensors[3][row] = tensors[0][1] * value if value == 100 else value
    with fastkd.use_backend("reference"):
        wanted = gradients(fastkd.crd_loss, *tensors, normalizers=(40.0, 40.0))
    assert not wanted[0].isfinite() and calm[0].isfinite()
    for _ in each_path:
        found = gradients(fastkd.crd_loss, *tensors, normalizers=(40.0, 40.0))
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_the_bits_do_not_depend_on_threads_or_on_what_is_wanted(each_path, set_threads):
    tensors = case(9, 700, size=6000, width=70, dtype=torch.float32)
    for _ in each_path:
        found = []
        for count in (1, 3):
            set_threads(count)
            found.append(gradients(fastkd.crd_loss, *tensors))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        x = tensors[0].clone().requires_grad_()
        (alone,) = torch.autograd.grad(fastkd.crd_loss(x, *tensors[1:])[0], x)
        assert torch.equal(alone, found[0][2])
        assert torch.equal(fastkd.crd_loss(*tensors)[0], found[0][0])


def test_strided_and_mixed_inputs_are_read_right(each_path):
    tensors = case(4, 30, size=90, width=16, dtype=torch.float32)
    wanted = gradients(fastkd.crd_loss, *tensors)
    apart = [torch.stack([x, x + 1], 1)[:, 0] for x in tensors]
    assert not any(x.is_contiguous() for x in apart)
    found = gradients(fastkd.crd_loss, *apart)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_kernel_refuses_what_it_would_misread(each_path):
    s, t, s_bank, t_bank, rows = case(3, 5, size=9, width=4, dtype=torch.float32)
    given = torch.ones(2)
    numbers = 0.07, 1e-7, 1.0, True, True
    good = s, t, s_bank, t_bank, rows, given
    torch.library.opcheck(torch.ops.fastkd.crd_pass, (*good, *numbers), test_utils="test_schema")
    for place, wrong, words in (
        (0, s.double(), "s must be float32"),
        (0, s[0], "s and t_bank must have two dimensions"),
        (1, t.T.contiguous().T, "t must be dense"),
        (2, s_bank[:8], r"s_bank must be \(9, 4\)"),
        (4, rows.int(), r"rows must be int64, \(3, K \+ 1\)"),
        (4, rows[:, :1], "rows must be int64"),
        (4, rows[:2], "rows must be int64"),
        (4, torch.full_like(rows, 9), "rows must be rows of the banks"),
        (4, torch.full_like(rows, -1), "rows must be rows of the banks"),
        (4, rows.index_fill(1, torch.tensor(0), 9), "rows must be rows of the banks"),
        (5, torch.ones(3), "given must be two numbers"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastkd.crd_pass(*good[:place], wrong, *good[place + 1 :], *numbers)


@pytest.mark.parametrize("row", [9, -1])
@pytest.mark.parametrize("column", [0, 3])
def test_a_row_outside_the_banks_is_named(cpp, row, column):
    """The kernel looks at all rows, and what it finds is told as elsewhere."""
    *tensors, rows = case(3, 5, size=9, width=4, dtype=torch.float32)
    rows[1, column] = row
    with pytest.raises(ValueError, match=f"^rows has {row}, wanted rows 0 to 8 of the bank") as caught:
        fastkd.crd_loss(*tensors, rows)
    assert "\n" not in str(caught.value)


def test_the_kernel_is_left_alone_where_another_backend_is_asked_for(each_path):
    tensors = case(3, 5, size=9, width=4, dtype=torch.float32)
    for name, wanted in (("auto", True), ("cpp", True), ("reference", False)):
        with fastkd.use_backend(name), torch.profiler.profile() as found:
            fastkd.crd_loss(*tensors)
        assert ("fastkd::crd_pass" in {event.key for event in found.key_averages()}) == wanted, name


def test_memory_is_that_of_the_drawn_numbers(each_path):
    """No scores of whole banks, 12 MB here, and no drawn rows, 270 MB: the order of the rows takes 1 MB."""
    n, k, size, width = 64, 8192, 50_000, 128
    vectors = [unit(torch.randn(count, width)).requires_grad_(count == n) for count in (n, n, size, size)]
    rows = torch.randint(size, (n, k + 1))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        fastkd.crd_loss(*vectors, rows, normalizers=(5e4, 5e4))[0].backward()
    held = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2**20 < peak < 3 * 2**20
