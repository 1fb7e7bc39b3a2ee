"""RKD against an independent form, its worked figures, and what it may not do: build triples, or blow up on
equal samples.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from autograd_cases import gradients

import fastkd
from fastkd import reference

FORMS = [fastkd.rkd_loss, reference.rkd_loss]
forms = pytest.mark.parametrize("rkd_loss", FORMS, ids=["fused", "reference"])


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def by_hand(student, teacher, distance_weight=25.0, angle_weight=50.0):
    """Pair by pair and triple by triple, in Python; gradients by autograd. For samples that all differ."""
    found = []
    for e in (student, teacher):
        e = e.flatten(1).double()
        n = len(e)
        lengths = {(i, j): (e[i] - e[j]).pow(2).sum().sqrt() for i, j in itertools.permutations(range(n), 2)}
        mean = sum(lengths.values()) / len(lengths)
        zero = e.new_zeros(())
        pairs = [lengths[i, j] / mean if i != j else zero for i in range(n) for j in range(n)]
        triples = [
            torch.dot(e[j] - e[i], e[k] - e[i]) / (lengths[i, j] * lengths[i, k]) if i not in (j, k) else zero
            for i in range(n)
            for j in range(n)
            for k in range(n)
        ]
        found.append((torch.stack(pairs), torch.stack(triples)))
    distance, angle = (
        torch.where((s - t).abs() < 1, 0.5 * (s - t) ** 2, (s - t).abs() - 0.5).mean()
        for s, t in zip(*found, strict=True)
    )
    return distance_weight * distance + angle_weight * angle


@forms
def test_the_worked_figures(rkd_loss):
    student, teacher = worked((3, 2), 3), worked((3, 4), 5)
    for weights, wanted in (
        ((25.0, 50.0), 8.6642730953),
        ((1.0, 0.0), 0.1815458583),
        ((0.0, 1.0), 0.0825125328),
    ):
        found = rkd_loss(student, teacher, distance_weight=weights[0], angle_weight=weights[1])
        assert found.dtype == torch.float64 and abs(found.item() - wanted) <= 5e-11
    assert rkd_loss(worked((2, 2), 3), worked((2, 4), 5)).item() == pytest.approx(0, abs=1e-15)


@forms
@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(rkd_loss, seed):
    chosen = random.Random(seed)
    n, sizes = chosen.choice((2, 3, 4, 5, 7)), [chosen.choice((1, 2, 3, 5, 17)) for _ in range(2)]
    shapes = [(n, size) if chosen.random() < 0.7 else (n, size, 2, 3) for size in sizes]
    tensors = [
        torch.randn(shape, dtype=torch.float64) * scale
        for shape, scale in zip(shapes, (1, chosen.choice((0.1, 1, 30))), strict=True)
    ]
    weights = chosen.choice(((25.0, 50.0), (3.0, 0.0), (0.0, 2.0)))
    found = gradients(
        lambda s, t: rkd_loss(s, t, distance_weight=weights[0], angle_weight=weights[1], weight=0.5), *tensors
    )
    wanted = gradients(lambda s, t: 0.5 * by_hand(s, t, *weights), *tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_computed_in_float32(dtype):
    tensors = [torch.randn(9, size).to(dtype) for size in (7, 12)]
    found = gradients(fastkd.rkd_loss, *tensors)
    exact = gradients(reference.rkd_loss, *(x.double() for x in tensors))
    assert found[0].dtype == torch.float32 and [x.dtype for x in found[1:]] == [dtype] * 2
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastkd.rkd_loss(*tensors), found[0])


def test_several_chunks_are_one(monkeypatch):
    tensors = [torch.randn(13, size, dtype=torch.float64) for size in (3, 5)]
    found = []
    for numbers in (1, 900, 10**6):  # one vertex, some, and all at once
        monkeypatch.setattr("fastkd.ops._rkd_forms.NUMBERS", numbers)
        found.append(gradients(fastkd.rkd_loss, *tensors))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-13)


@forms
def test_equal_samples_have_no_relation_and_no_gradient(rkd_loss):
    student, teacher = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    student[3] = student[1]
    loss, ours, theirs = gradients(rkd_loss, student, teacher)
    assert loss.isfinite() and ours.abs().max() < 1e3 and theirs.abs().max() < 1e3
    # close to it the angle between the two and a third is a random number, but that of the others is the same
    moved = student.clone()
    moved[3] += 1e-9
    equal, apart = (rkd_loss(x, teacher, angle_weight=0.0) for x in (student, moved))
    assert abs(apart - equal) < 0.5 * equal  # the mean of the positive distances has two more
    for alike in (torch.ones(4, 3), torch.zeros(4, 3)):
        found = gradients(rkd_loss, alike, torch.randn(4, 6))
        assert all(x.isfinite().all() for x in found) and not found[1].any()


def test_near_duplicates_far_from_the_origin_keep_their_gradient():
    student = torch.randn(6, 8, dtype=torch.float64)
    student[1] = student[0] + 1e-3 * torch.randn(8, dtype=torch.float64)
    student, teacher = (student + 100).float(), torch.randn(6, 8)
    found, exact = (
        gradients(fastkd.rkd_loss, student, teacher),
        gradients(reference.rkd_loss, student.double(), teacher.double()),
    )
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()


@forms
@pytest.mark.parametrize("images", [25, 64])  # torch.cdist multiplies matrices beyond 25 rows
def test_vectors_far_from_the_origin_keep_their_distances(rkd_loss, images):
    """There ``torch.cdist`` finds a vector up to 0.9 away from itself, and others up to 40 % too near or
    far.
    """
    student, teacher = (100 + 0.1 * torch.randn(images, 128) for _ in range(2))
    exact = gradients(reference.rkd_loss, student.double(), teacher.double())
    for got, want in zip(gradients(rkd_loss, student, teacher), exact, strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()
    assert rkd_loss(student, student.clone()) < 1e-12
    assert rkd_loss(student.bfloat16(), teacher.bfloat16()).isfinite()  # where cdist has no kernel


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_near_samples_are_as_exact_as_others(apart):
    student, teacher = torch.randn(9, 8), torch.randn(9, 5)
    for x in (student, teacher):
        x[1] = x[0] + apart * torch.randn(len(x[0]))
    found = gradients(fastkd.rkd_loss, student, teacher)
    exact = gradients(reference.rkd_loss, student.double(), teacher.double())
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() < 1e-6 * want.norm()


def test_a_teacher_under_inference_mode_is_a_teacher():
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)
    with torch.inference_mode():
        made = teacher.clone()
    found = [torch.autograd.grad(fastkd.rkd_loss(student, x), student) for x in (made, teacher)]
    assert torch.equal(*(x for (x,) in found))


def test_only_wanted_gradients_are_computed_and_one_only():
    student, teacher = (
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(4, 2, dtype=torch.float64),
    )
    _, ours, theirs = torch.ops.fastkd.rkd_loss(student.detach(), teacher, 25.0, 50.0, True, False)
    assert ours.shape == (4, 3) and theirs.numel() == 0
    (grad,) = torch.autograd.grad(fastkd.rkd_loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fastkd\.reference\.rkd_loss"):
        grad.sum().backward()
    assert torch.autograd.gradcheck(fastkd.rkd_loss, (student, teacher.requires_grad_()))
    torch.library.opcheck(
        torch.ops.fastkd.rkd_loss, (torch.randn(4, 3), torch.randn(4, 2), 25.0, 50.0, True, True)
    )
    upstream = torch.tensor(-3.0, dtype=torch.float64)
    (scaled,) = torch.autograd.grad(fastkd.rkd_loss(student, teacher), student, upstream)
    torch.testing.assert_close(scaled, -3 * grad.detach())


def test_it_is_one_graph():
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4)

    def step(student, teacher):
        return fastkd.rkd_loss(student * 2, teacher, weight=0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, student, teacher), gradients(step, student, teacher))


@pytest.mark.parametrize("weights", [(25.0, 50.0), (25.0, 0.0), (0.0, 50.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
def test_transposed_sides_have_gradients_laid_out_as_they_are(backend, dtype, weights):
    """A graph is made for the strides that fakes tell."""
    sides = [torch.randn(width, 6, dtype=dtype).T for width in (5, 3)]
    with fastkd.use_backend(backend):
        torch.library.opcheck(
            torch.ops.fastkd.rkd_loss,
            (*sides, *weights, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )
        found = torch.ops.fastkd.rkd_loss(*sides, *weights, True, True)[1:]
    assert [x.stride() for x in found] == [(1, 6), (1, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operator_of_triton_answers_in_float32_on_a_cpu_too(dtype):
    sides = [torch.randn(width, 6).T.to(dtype) for width in (5, 3)]
    for needs in ((True, True), (False, True)):
        torch.library.opcheck(
            torch.ops.fastkd.rkd_pass,
            (*sides, 25.0, 50.0, *needs),
            test_utils=("test_schema", "test_faketensor"),
        )
    found = torch.ops.fastkd.rkd_pass(*sides, 25.0, 50.0, True, True)
    assert all(x.dtype == torch.float32 for x in found)
    wanted = torch.ops.fastkd.rkd_loss(*[x.double() for x in sides], 25.0, 50.0, True, True)
    torch.testing.assert_close(found, tuple(x.float() for x in wanted), rtol=1e-5, atol=1e-5)


def test_the_operator_of_triton_refuses_float64_on_a_cpu_too():
    x = torch.randn(4, 3)
    for name, pair in (("s", (x.double(), x)), ("t", (x, x.double()))):
        with pytest.raises(TypeError, match=f"^{name} must be float16, bfloat16 or float32"):
            torch.ops.fastkd.rkd_pass(*pair, 25.0, 50.0, True, True)


def test_memory_is_that_of_pairs():
    """(B, B, D) would take 64 MB here and (B, B, B) 134 MB; a matrix of pairs is 1 MB, and so are the vectors
    of the batch.
    """
    student, teacher = torch.randn(512, 512, requires_grad=True), torch.randn(512, 512)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        fastkd.rkd_loss(student, teacher).backward()
    held = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2**20 < peak < 24 * 2**20


@forms
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"student": torch.ones(1, 3), "teacher": torch.ones(1, 3)},
            ValueError,
            "one sample has no relations, wanted at least two",
        ),
        ({"teacher": torch.ones(5, 3)}, ValueError, "teacher"),
        ({"student": torch.ones(4)}, ValueError, r"student .* wanted \(N, \.\.\.\)"),
        ({"student": torch.ones(4, 0)}, ValueError, "student"),
        ({"student": torch.ones(4, 3).long()}, TypeError, "student .*wanted float16"),
        ({"teacher": [1.0]}, TypeError, "teacher is list, wanted a tensor"),
        ({"angle_weight": "x"}, TypeError, "angle_weight"),
        ({"weight": float("nan")}, ValueError, "weight is nan"),
    ],
)
def test_bad_input_is_one_line(rkd_loss, change, error, words):
    arguments = {"student": torch.ones(4, 3), "teacher": torch.ones(4, 2), **change}
    with pytest.raises(error, match=words) as caught:
        rkd_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)
    assert "\n" not in str(caught.value)


def test_the_method_reads_the_pooled_vectors():
    torch.manual_seed(1)
    student, teacher = fastkd.models.create_model("resnet8"), fastkd.models.create_model("resnet8x4")
    distillation = fastkd.Distillation(
        student, teacher, "rkd", options={"rkd": {"beta": 0.5}}, fold=False
    ).eval()
    images = torch.randn(5, 3, 32, 32)
    losses = distillation(images, torch.arange(5))
    pooled = [network(images, features=True)[0].pooled for network in (student, teacher)]
    torch.testing.assert_close(losses.terms["rkd"].double(), 0.5 * by_hand(*pooled), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.terms["ce"], F.cross_entropy(losses.student_logits, torch.arange(5)))
    assert fastkd.methods.define("kd+at+rkd", preset="repdistiller").names == ("ce", "at", "rkd", "kd")
    assert fastkd.RKD.preset("lenscloth").angle_weight == 2 and fastkd.RKD(angle_weight=1).extra_repr()
