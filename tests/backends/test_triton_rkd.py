"""RKD's Triton kernels, interpreted where there is no GPU: values and gradients against float64, samples that
are equal, near, far or no numbers, choosing the kernels, and what they keep.
"""

from __future__ import annotations

import random

import pytest
import torch
from autograd_cases import gradients
from rkd_cases import LAUNCHED, agree, exact, on_a_line
from support import missing

import fastkd
from fastkd import kernels
from fastkd.kernels import limits

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]
# (images, widths): one block of samples and several, even and odd numbers of blocks, a last one that is not
# full; widths that are 1, no power of two, and more than a program takes
SHAPES = [(2, 3, 7), (5, 1, 5), (7, 64, 33), (16, 16, 1), (17, 130, 61), (33, 9, 16)]


@pytest.mark.parametrize("weights", [(25.0, 50.0), (3.0, 0.0), (0.0, 7.0)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_match_float64(triton, launched, shape, weights):
    count, *widths = shape
    student, teacher = (
        triton(scale * torch.randn(count, width) + scale) for scale, width in zip((3, 1), widths)
    )
    if count > 3:
        teacher[2], student[1] = teacher[0], student[3]  # equal samples, of either side
    options = {"distance_weight": weights[0], "angle_weight": weights[1], "weight": 0.7}
    found = gradients(lambda s, t: fastkd.rkd_loss(s, t, **options), student, teacher)
    assert launched == LAUNCHED and all(x.dtype == torch.float32 for x in found)
    if count == 2:  # one distance, which is the mean of both sides: what is left is rounding
        assert all(x.abs().max() < 1e-5 for x in found)
    else:
        left = [on_a_line(x, 0.7 * weights[1]) for x in (student, teacher)]
        agree(found, exact(student, teacher, **options), cancelled=(0, *left))


@pytest.mark.parametrize("count", [23, 40])
def test_large_batches_have_tiles_of_pairs_of_their_own(triton, monkeypatch, count):
    loss = pytest.importorskip("fastkd.kernels.rkd.loss")
    tensors = [triton(torch.randn(count, width)) for width in (5, 19)]
    monkeypatch.setattr(loss, "_plans", type(loss._plans)())
    monkeypatch.setattr(loss, "LARGE", count)
    agree(gradients(fastkd.rkd_loss, *tensors), exact(*tensors))


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_half_precision_is_read_as_it_is(triton, launched, dtypes):
    tensors = [
        triton(torch.randn(9, width).to(dtype)).requires_grad_() for width, dtype in zip((7, 12), dtypes)
    ]
    loss = fastkd.rkd_loss(*tensors)
    found = torch.autograd.grad(2.0**10 * loss, tensors)
    wanted = exact(*tensors)
    assert launched == LAUNCHED and loss.dtype == torch.float32
    assert [x.dtype for x in found] == list(dtypes)
    agree([loss], wanted[:1])
    for got, want in zip(found, wanted[1:], strict=True):
        agree([got], [2.0**10 * want], 1e-6 if got.dtype == torch.float32 else 2.0**-8)


def test_any_strides_are_read_and_gradients_have_them(triton):
    student, teacher = triton(torch.randn(20, 6)).T, triton(torch.randn(6, 4, 3, 2))[:, ::2]
    wide = triton(torch.randn(6, 4, 3, 2)).to(memory_format=torch.channels_last)
    for t in (teacher, wide):
        agree(gradients(fastkd.rkd_loss, student, t), exact(student, t))
    ours = torch.ops.fastkd.rkd_loss(student, wide.flatten(1), 25.0, 50.0, True, False)[1]
    assert ours.stride() == student.stride()


# samples that are special


def test_equal_samples_have_no_relation_and_no_gradient(triton):
    student, teacher = triton(torch.randn(5, 4)), triton(torch.randn(5, 3))
    student[3] = student[1]
    found = gradients(fastkd.rkd_loss, student, teacher)
    agree(found, exact(student, teacher))
    assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in found)
    for alike in (torch.ones(4, 3), torch.zeros(4, 3), torch.randn(1, 3).expand(4, 3)):
        found = gradients(fastkd.rkd_loss, triton(alike), triton(torch.randn(4, 6)))
        assert all(x.isfinite().all() for x in found) and not found[1].any()


def test_zero_vectors_are_samples_like_others(triton):
    student, teacher = triton(torch.randn(6, 5)), triton(torch.randn(6, 4))
    student[2], teacher[[1, 4]] = 0, 0
    agree(gradients(fastkd.rkd_loss, student, teacher), exact(student, teacher))


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(("near", "sides"), [(2, 2), (4, 2), (2, 1), (4, 1)])
def test_each_sample_beside_near_ones_is_as_exact_as_others(triton, apart, near, sides):
    """The near ones' own gradients are 1 / ``apart`` as large: the norm of all would not see the others."""
    tensors = [torch.randn(9, width) for width in (8, 5)]
    for x in tensors[:sides]:
        x[1:near] = x[0] + apart * torch.randn(near - 1, x.shape[1])
    tensors = [triton(x) for x in tensors]
    found, wanted = gradients(fastkd.rkd_loss, *tensors), exact(*tensors)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        off = (got.double().cpu() - want).norm(dim=1) / want.norm(dim=1)
        assert off.max() < 2e-6, off


def test_vectors_far_from_the_origin_keep_their_distances(triton):
    student, teacher = (triton(100 + 0.1 * torch.randn(25, 70)) for _ in range(2))
    agree(gradients(fastkd.rkd_loss, student, teacher), exact(student, teacher))


def test_equal_networks_have_no_loss_and_no_gradient(triton):
    student = triton(100 + torch.randn(19, 30))
    found = gradients(fastkd.rkd_loss, student, student.clone())
    assert not any(x.any() for x in found)


def test_samples_nearer_than_a_double_can_tell_are_equal_in_the_angles(triton):
    """Where both are near the origin float32 holds differences of 1e-20 times the other distances."""
    student, teacher = torch.randn(6, 5), torch.randn(6, 4)
    student[0] = 0
    wanted = exact(student.index_copy(0, torch.tensor([1]), student[:1]), teacher, distance_weight=0.0)
    student[1] = 1e-20 * torch.randn(5)
    found = gradients(
        lambda s, t: fastkd.rkd_loss(s, t, distance_weight=0.0), triton(student), triton(teacher)
    )
    agree(found, wanted)
    agree(gradients(fastkd.rkd_loss, triton(student), triton(teacher))[:1], exact(student, teacher)[:1], 0.1)


@pytest.mark.parametrize("scales", [(1e-22, 1e17), (1e17, 1e-30)], ids=str)
def test_the_scale_of_the_samples_does_not_matter(triton, scales):
    tensors = [triton(scale * torch.randn(7, 6)) for scale in scales]
    agree(gradients(fastkd.rkd_loss, *tensors), exact(*tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", [(25.0, 0.0), (0.0, 50.0)], ids=str)
def test_what_is_not_a_number_stays_so(triton, value, weights):
    student, teacher = triton(torch.randn(20, 6)), triton(torch.randn(20, 4))
    student[random.randrange(20), 3] = value
    loss, ours, _ = gradients(
        lambda s, t: fastkd.rkd_loss(s, t, distance_weight=weights[0], angle_weight=weights[1]),
        student,
        teacher,
    )
    assert loss.isnan() and ours.isnan().all()


# what every call keeps


def test_results_are_the_same_bits_in_each_run_and_whatever_is_wanted(triton):
    student, teacher = triton(torch.randn(37, 21)), triton(torch.randn(37, 40))
    first = gradients(fastkd.rkd_loss, student, teacher)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(fastkd.rkd_loss, student, teacher)))
    for i in (0, 1):
        sides = [x.clone().requires_grad_(i == j) for j, x in enumerate((student, teacher))]
        (alone,) = torch.autograd.grad(fastkd.rkd_loss(*sides), sides[i])
        assert torch.equal(alone, first[1 + i])
    assert torch.equal(fastkd.rkd_loss(student, teacher), first[0])


def test_memory_is_that_of_pairs(triton, monkeypatch):
    """(N, N, D) would be 480 thousand numbers here, and (N, N, N) 64 thousand."""
    made, original = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    student, teacher = triton(torch.randn(40, 300)), triton(torch.randn(40, 300))
    gradients(fastkd.rkd_loss, student, teacher)
    assert 2 * 48**2 < max(x.numel() for x in made) < 6 * 48**2


def test_what_a_graph_holds_runs_the_kernels_too(triton, launched):
    student, teacher = triton(torch.randn(6, 5)), triton(torch.randn(6, 4))
    loss, ours, theirs = torch.ops.fastkd.rkd_loss(student, teacher, 25.0, 50.0, True, False)
    assert launched == LAUNCHED and not theirs.numel()
    agree([loss, ours], exact(student, teacher)[:2])


def test_upstream_gradients_autocast_and_second_derivatives(triton):
    student, teacher = triton(torch.randn(6, 5)).requires_grad_(), triton(torch.randn(6, 4))
    loss = fastkd.rkd_loss(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, student, torch.tensor(-3.0, device=loss.device), create_graph=True)
    torch.testing.assert_close(scaled, -3 * grad)
    with pytest.raises(RuntimeError, match=r"fastkd\.reference\.rkd_loss"):
        scaled.sum().backward()
    with torch.autocast(student.device.type, torch.bfloat16):
        assert torch.equal(fastkd.rkd_loss(student, teacher), loss)
    with torch.inference_mode():
        made = teacher.clone()
    assert torch.equal(torch.autograd.grad(fastkd.rkd_loss(student, made), student)[0], grad)
    with torch.no_grad():
        assert not fastkd.rkd_loss(student, teacher).requires_grad


# choosing


def test_other_backends_leave_the_kernels_alone(launched):
    student, teacher = torch.randn(5, 4), torch.randn(5, 3)
    for name in ("auto", "reference"):
        with fastkd.use_backend(name):
            fastkd.rkd_loss(student, teacher)
    assert not launched


def test_what_the_kernels_do_not_serve_is_refused_by_name(triton):
    x, y = triton(torch.randn(4, 3).double()), triton(torch.randn(4, 3))
    for pair in ((x, y), (y, x)):
        with pytest.raises(fastkd.BackendError, match="float64"):
            fastkd.rkd_loss(*pair)
    # where there is a GPU but no library, or the emulated one for CPU tensors, that is what is said
    why = f"'cuda' .*({limits.NO_KERNEL}|is not available|serves CPU tensors)"
    with fastkd.use_backend("cuda"), pytest.raises(fastkd.BackendError, match=why):
        fastkd.rkd_loss(y, y)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "words"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), ValueError, r"t must be \(4, D\)"),
        (torch.ones(4, 3), torch.ones(4), ValueError, "t must be"),
        (torch.ones(4, 3).double(), torch.ones(4, 3), TypeError, "s must be float16, bfloat16 or float32"),
        (torch.ones(4, 0), torch.ones(4, 3), ValueError, "s is empty"),
        (torch.ones(1, 1).expand(50_000, 1), torch.ones(50_000, 1), ValueError, "s has 50000 samples"),
        (torch.ones(2, 1), torch.ones(2, 1).expand(2, 2**31), ValueError, "t has 2147483648 numbers"),
    ],
)
def test_the_launcher_refuses_what_it_would_misread(triton, student, teacher, error, words):
    with pytest.raises(error, match=words):
        kernels.launcher("rkd_pass")(triton(student), triton(teacher), 25.0, 50.0, True, True)


def test_one_sample_has_no_relation(triton):
    """The public function refuses it; a part of a batch may be one."""
    loss, ours, theirs = kernels.launcher("rkd_pass")(
        triton(torch.randn(1, 5)), triton(torch.randn(1, 3)), 25.0, 50.0, True, True
    )
    assert not loss.any() and not ours.any() and not theirs.any()
