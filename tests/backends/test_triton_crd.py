"""CRD's Triton kernels, interpreted where there is no GPU: values and gradients against float64, choosing
them, what they refuse.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from crd_cases import by_hand, case, unit
from support import missing

import fastkd
from fastkd import backends, kernels, native, reference
from fastkd.kernels import limits

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
KERNELS = ["crd_odds_kernel", "crd_loss_kernel", "crd_sum_kernel"]
# (images, negatives, rows of a bank, width): one tile of few rows and several, several parts of several tiles
# and a last one that is short, widths that are no power of two, one number, more columns than a tile has rows
CASES = [(1, 1, 2, 1), (3, 17, 50, 37), (2, 700, 900, 37), (3, 515, 70, 64), (2, 9, 20, 1500), (1, 700, 9, 1)]


def gradients(loss, student, teacher, *rest, **options):
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    out, normalizers = loss(*leaves, *rest, **options)
    return [out, normalizers, *torch.autograd.grad(out, leaves)]


def given(tensors, triton, dtype=torch.float32):
    return [triton(x.to(dtype) if x.is_floating_point() else x) for x in tensors]


def agree(found, exact, slope, tolerance=2e-6):
    """``slope``: what one row brings to a gradient at most; gradients are sums of such."""
    for got, want, least in zip(found, exact, (0, 0, slope, slope)[: len(exact)], strict=True):
        largest = max(want.abs().max().item(), least)
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("normalizers", [None, (900.0, 0.0), (700.0, 1100.0)], ids=str)
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_the_kernels_match_float64(triton, launched, sizes, normalizers):
    n, k, size, width = sizes
    tensors = case(n, k, size, width, seed=k)
    options = {"weight": 0.7, "temperature": 0.1, "eps": 1e-3, "normalizers": normalizers}
    exact = gradients(reference.crd_loss, *tensors, **options)
    found = gradients(fastkd.crd_loss, *given(tensors, triton), **options)
    assert all(x.dtype == torch.float32 for x in found) and launched == KERNELS
    agree(found, exact, options["weight"] / options["temperature"] / n)


def test_the_kernels_match_the_published_form_by_hand(triton):
    tensors = case(3, 40, size=70, width=21, seed=5)
    wanted = gradients(by_hand, *tensors)
    found = gradients(fastkd.crd_loss, *given(tensors, triton))
    torch.testing.assert_close([x.double().cpu() for x in found], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_banks_of_half_precision_are_read_as_they_are(triton, dtype):
    tensors = given(case(3, 300, size=90, width=44), triton, dtype)
    wide = [x.double().cpu() if x.is_floating_point() else x.cpu() for x in tensors]
    exact = gradients(reference.crd_loss, *wide)
    found = gradients(fastkd.crd_loss, *tensors)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
    agree(found[:2], exact[:2], 0)
    for got, want in zip(found[2:], exact[2:], strict=True):
        bound = torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=bound)
    mixed = [tensors[0].float(), tensors[1], tensors[2].float(), *tensors[3:]]
    agree(gradients(fastkd.crd_loss, *mixed)[:2], exact[:2], 0)


@pytest.mark.parametrize("drawn", [0, 3], ids=["the positive", "another row"])
def test_a_row_that_is_drawn_again_and_again_counts_each_time(triton, drawn):
    *vectors, rows = case(3, 300, size=40, width=24)
    rows[:, 1::2] = rows[:, drawn : drawn + 1]
    exact = gradients(reference.crd_loss, *vectors, rows)
    agree(gradients(fastkd.crd_loss, *given((*vectors, rows), triton)), exact, 1 / 0.07 / 3)


@pytest.mark.parametrize("temperature", [0.02, 0.013])
def test_large_similarities(triton, temperature):
    """Scores of up to 77 and exponentials of up to 1e33, of embeddings that are nearly rows of the banks."""
    *vectors, rows = case(4, 60, size=80, width=32)
    for x, bank in ((vectors[0], vectors[3]), (vectors[1], vectors[2])):
        x.copy_(unit(bank[rows[:, 5]] + 1e-3 * x))
    exact = gradients(reference.crd_loss, *vectors, rows, temperature=temperature)
    found = gradients(fastkd.crd_loss, *given((*vectors, rows), triton), temperature=temperature)
    # a score is as near as its roundings, 6e-8 each, and what is made of it no nearer
    agree(found, exact, 1 / temperature / 4, tolerance=2e-7 / temperature)


def test_exponentials_and_logarithms_over_all_of_floats_range(triton):
    """One negative, whose u = e^score here, and a positive that adds nothing: loss and gradient are
    log(1 + u) and u / (1 + u), to the roundings of a score of up to 88.
    """
    x, rows = torch.ones(1, 1), torch.tensor([[0, 1]])
    for score in [*torch.linspace(-70, 88.5, 80).tolist(), -1e-6, 1e-6]:
        bank = torch.tensor([[88.0], [score]])
        found, exact = (
            gradients(loss, a, a, b, b, rows, temperature=1.0, normalizers=(2.0, 2.0), eps=0.0)
            for loss, a, b in (
                (fastkd.crd_loss, triton(x), triton(bank)),
                (reference.crd_loss, x.double(), bank.double()),
            )
        )
        torch.testing.assert_close([y.double().cpu() for y in found], exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 100.0], ids=str)
def test_what_is_no_number_or_too_large_comes_out_as_in_plain_pytorch(triton, value):
    tensors = case(2, 40, size=50, width=16, dtype=torch.float32)
    row = int(tensors[4][1, 7])
    tensors[3][row] = tensors[0][1] * value if value == 100 else value
    with fastkd.use_backend("reference"):
        wanted = gradients(fastkd.crd_loss, *tensors, normalizers=(40.0, 40.0))
    found = gradients(fastkd.crd_loss, *given(tensors, triton), normalizers=(40.0, 40.0))
    assert not wanted[0].isfinite()
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got.isnan().cpu(), want.isnan()) and torch.equal(got.isinf().cpu(), want.isinf())


def test_the_same_bits_in_each_run_and_whatever_is_wanted(triton):
    tensors = given(case(3, 700, size=900, width=37), triton)
    first = gradients(fastkd.crd_loss, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(fastkd.crd_loss, *tensors), strict=True))
    for place in (0, 1):
        leaves = [x.detach().requires_grad_(i == place) for i, x in enumerate(tensors[:2])]
        loss = fastkd.crd_loss(*leaves, *tensors[2:])[0]
        (alone,) = torch.autograd.grad(loss, leaves[place])
        if not torch.cuda.is_available():  # of another kernel a compiler may contract other sums
            assert torch.equal(loss, first[0]) and torch.equal(alone, first[2 + place])
    loss, normalizers = fastkd.crd_loss(*tensors)
    torch.testing.assert_close([loss, normalizers], first[:2], rtol=1e-6, atol=0)


def test_strided_inputs_and_negative_views_are_read_right(triton):
    tensors = given(case(2, 30, size=90, width=16), triton)
    wanted = gradients(fastkd.crd_loss, *tensors)
    apart = [torch.stack([x, x + 1], 1)[:, 0] for x in tensors]
    assert not any(x.is_contiguous() for x in apart)
    negative = torch.complex(-tensors[2], -tensors[2]).conj().imag
    assert negative.is_neg() and torch.equal(negative, tensors[2])
    for other in (apart, [*tensors[:2], negative, *tensors[3:]]):
        found = gradients(fastkd.crd_loss, *other)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_memory_is_of_parts_and_never_of_drawn_rows(triton, monkeypatch):
    made = []
    for name in ("new_empty", "new_zeros"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, o=original, **k: made.append(o(*a, **k)) or made[-1]
        )
    tensors = given(case(4, 2000, size=300, width=64), triton)
    gradients(fastkd.crd_loss, *tensors, normalizers=triton(torch.ones(2)))
    drawn = tensors[4].numel() * 64
    assert made and max(x.numel() for x in made) * 20 < drawn


def test_a_row_outside_the_banks_is_seen_and_read_nowhere(triton):
    """On a GPU nobody looks at the rows before the kernel does."""
    s, t, *banks, rows = given(case(2, 30, size=9, width=4), triton)
    launch, numbers = kernels.launcher("crd_pass"), (0.07, 1e-7, 1.0, True, True)
    for place, wrong in itertools.product((0, 7), (9, -1, 2**40)):
        bad = rows.clone()
        bad[1, place] = wrong
        loss, _, *grads = launch(s, t, *banks, bad, triton(torch.ones(2)), *numbers)
        assert loss.isnan() and all(x[1].isnan().all() and x[0].isfinite().all() for x in grads)


def test_the_launcher_refuses_what_it_would_misread(triton):
    s, t, s_bank, t_bank, rows = given(case(3, 5, size=9, width=4), triton)
    good = s, t, s_bank, t_bank, rows, triton(torch.ones(2))
    launch, numbers = kernels.launcher("crd_pass"), (0.07, 1e-7, 1.0, True, True)
    for place, wrong, words in (
        (0, s.double(), "s must be float16, bfloat16 or float32, got torch.float64"),
        (0, s.bfloat16(), "s, t and given must be float32"),
        (0, s[0], "s must be a contiguous matrix"),
        (1, t.T.contiguous().T, "t must be a contiguous matrix"),
        (4, rows[:, :1].expand(-1, 2**30 + 1), "rows must be contiguous"),
        (1, t[:2], r"wanted \(B, D\) twice and \(M, D\) twice"),
        (2, s_bank[:8], r"wanted \(B, D\) twice and \(M, D\) twice"),
        (3, t_bank.half(), "both banks of one dtype"),
        (3, t_bank.to("meta"), "t_bank lies on meta"),
        (4, rows.int(), r"rows must be contiguous int64 \(3, K \+ 1\)"),
        (4, rows[:, :1], "rows must be contiguous int64"),
        (4, rows[:2], "rows must be contiguous int64"),
        (5, torch.ones(3), "given must be two numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            launch(*good[:place], wrong, *good[place + 1 :], *numbers)
        assert "\n" not in str(caught.value)


# choosing


def test_who_serves_what(triton, launched):
    tensors = given(case(), triton)
    loss, normalizers = fastkd.crd_loss(*tensors)
    assert launched == KERNELS
    # what a graph holds
    found = torch.ops.fastkd.crd_loss(*tensors, triton(torch.zeros(2)), 0.07, 1e-7, 1.0, False, True)
    assert torch.equal(found[0], loss) and torch.equal(found[1], normalizers)
    assert found[2].numel() == 0 and found[3].shape == tensors[1].shape
    assert launched == 2 * KERNELS
    launched[3:] = []
    with fastkd.use_backend("reference"):
        fastkd.crd_loss(*tensors)
    with pytest.raises(fastkd.BackendError, match="float64"):
        fastkd.crd_loss(*given(case(), triton, torch.float64))
    # where there is a GPU but no library, or the emulated one for CPU tensors, that is what is said
    why = f"'cuda' .*({limits.NO_KERNEL}|is not available|serves CPU tensors)"
    with fastkd.use_backend("cuda"), pytest.raises(fastkd.BackendError, match=why):
        fastkd.crd_loss(*tensors)
    assert launched == KERNELS


@pytest.mark.filterwarnings("ignore:fastkd serves CUDA tensors")
@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_auto_takes_triton_on_a_gpu_that_it_serves(monkeypatch, capability):
    """As on a GPU: with Triton there, from sm_80 on, for everything but float64."""
    monkeypatch.setattr(backends, "_capability", lambda index: capability)
    monkeypatch.setattr(native, "CUDA", dataclasses.replace(native.CUDA, available=True))
    monkeypatch.setattr(native, "why_no_code", lambda *args: "")
    monkeypatch.setattr(native, "cuda_architectures", lambda: ())

    def chosen(dtype):
        x = torch.ones(2, 3, dtype=dtype)
        return backends._select_on_gpu("crd_pass", (x, x, x, x), (), 0, limits.NO_KERNEL).name

    new = capability >= (8, 0)
    assert chosen(torch.float32) == chosen(torch.bfloat16) == ("triton" if new else "reference")
    assert chosen(torch.float64) == "reference"


def test_a_second_derivative_is_refused(triton):
    student, *rest = given(case(), triton)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(fastkd.crd_loss(student, *rest)[0], student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastkd\.reference\.crd_loss"):
        grad.sum().backward()
