"""RKD's C++ kernels on every code path."""

from __future__ import annotations

import pytest
import torch
from autograd_cases import gradients

import fastkd
from fastkd import reference


@pytest.mark.parametrize("weights", [(25.0, 50.0), (3.0, 0.0), (0.0, 7.0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (7, 64), (8, 3), (5, 61), (17, 130), (33, 9)], ids=str)
def test_the_kernels_match_float64_on_every_code_path(each_path, shape, weights):
    distance, angle = weights
    torch.manual_seed(shape[0])
    student, teacher = 3 * torch.randn(shape) + 5, torch.randn(shape[0], 6)
    if shape[0] > 3:
        teacher[2], student[1] = teacher[0], student[3]  # equal samples, of either side
    options = {"distance_weight": distance, "angle_weight": angle}

    def loss(s, t):
        return fastkd.rkd_loss(s, t, **options)

    exact = gradients(lambda s, t: reference.rkd_loss(s, t, **options), student.double(), teacher.double())
    for _ in each_path:
        found = gradients(loss, student, teacher)
        for got, want in zip(found, exact, strict=True):
            assert got.dtype == torch.float32
            # two samples have one distance: both sides are equal, and what is left is rounding
            torch.testing.assert_close(
                got.double(), want, rtol=2e-6, atol=2e-6 * max(1.0, want.abs().max().item())
            )


def test_the_kernels_bits_do_not_depend_on_threads_or_on_what_is_wanted(each_path, set_threads):
    student, teacher = torch.randn(41, 70), torch.randn(41, 33)
    for _ in each_path:
        found = []
        for count in (1, 3):
            set_threads(count)
            found.append(gradients(fastkd.rkd_loss, student, teacher))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        (alone,) = torch.autograd.grad(fastkd.rkd_loss(x := student.clone().requires_grad_(), teacher), x)
        assert torch.equal(alone, found[0][1]) and torch.equal(fastkd.rkd_loss(student, teacher), found[0][0])


def test_the_kernels_refuse_what_they_would_misread(each_path):
    ops, square = torch.ops.fastkd, torch.zeros(3, 3, dtype=torch.float64)
    for call, words in (
        (lambda: ops.rkd_lengths(square), "x must be float32"),
        (lambda: ops.rkd_lengths(torch.zeros(3, 4).T), "x must be dense"),
        (lambda: ops.rkd_lengths(torch.zeros(3)), "x must have two dimensions"),
        (
            lambda: ops.rkd_angles(square, square[:2], square, square, True, True),
            r"s_inverses must be \(3, 3\)",
        ),
        (
            lambda: ops.rkd_angles(square, square, square.float(), square, True, True),
            "t_products must be float64",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_the_kernels_are_left_alone_where_another_backend_is_asked_for(each_path):
    student, teacher = torch.randn(5, 4), torch.randn(5, 3)
    for name, wanted in (("auto", True), ("cpp", True), ("reference", False)):
        with fastkd.use_backend(name), torch.profiler.profile() as found:
            fastkd.rkd_loss(student, teacher)
        assert ("fastkd::rkd_angles" in {event.key for event in found.key_averages()}) == wanted, name
