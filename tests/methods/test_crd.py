"""CRD against an independent form and its worked figures; what its negatives are, and what its banks hold."""

from __future__ import annotations

import random

import pytest
import torch
from crd_cases import by_hand, case, unit

import fastkd
from fastkd import reference

FORMS = [fastkd.crd_loss, reference.crd_loss]
forms = pytest.mark.parametrize("crd_loss", FORMS, ids=["fused", "reference"])


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def gradients(loss, student, teacher, *rest, **options):
    leaves = [x.detach().requires_grad_() for x in (student, teacher)]
    out, normalizers = loss(*leaves, *rest, **options)
    return [out, normalizers, *torch.autograd.grad(out, leaves)]


@forms
def test_the_worked_figures(crd_loss):
    banks, index, rows = (
        [worked((4, 2), 3), worked((4, 2), 8)],
        torch.tensor([0, 3]),
        torch.tensor([[0, 1, 2], [3, 0, 1]]),
    )
    student = unit(worked((2, 3), 3) @ worked((2, 3), 7).T + worked((2,), 4))
    teacher = unit(worked((2, 2), 5) @ worked((2, 2), 2).T + worked((2,), 9))
    loss, normalizers = crd_loss(student, teacher, *banks, rows)
    assert loss.dtype == torch.float64 and abs(loss.item() - 11.0771321625) <= 5e-11
    torch.testing.assert_close(
        normalizers, torch.tensor([1351.8552743, 182.8373859], dtype=torch.float64), rtol=1e-9, atol=5e-8
    )
    module = fastkd.CRD(*banks)
    assert module(student, teacher, rows)[0] == fastkd.crd_loss(student, teacher, *banks, rows)[0]
    module.update(index, student, teacher, normalizers)
    wanted = torch.tensor([-0.7889788977, 0.6144202950], dtype=torch.float64)
    torch.testing.assert_close(module.student_bank[3], wanted, rtol=0, atol=5e-11)
    second = crd_loss(
        student, teacher, module.student_bank, module.teacher_bank, rows, normalizers=normalizers
    )
    assert abs(second[0].item() - 11.5884558945) <= 5e-11 and torch.equal(second[1], normalizers)
    assert abs(module(student, teacher, rows)[0].item() - 11.5884558945) <= 5e-11


@forms
@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(monkeypatch, crd_loss, seed):
    """A third of the cases each: the whole bank at once, gathered rows, and these one sample at a time."""
    chosen = random.Random(seed)
    monkeypatch.setattr("fastkd.ops.crd.CHEAPER", 10**6 if seed % 3 == 0 else 0)
    monkeypatch.setattr("fastkd.ops.crd.NUMBERS", 1 if seed % 3 == 2 else 10**6)
    n, k = chosen.choice((1, 2, 3, 7)), chosen.choice((1, 2, 5, 11))
    tensors = case(
        n, k, size=chosen.choice((2, 3, 9, 11)) if n > 1 else 2, width=chosen.choice((1, 2, 5, 17)), seed=seed
    )
    options = {
        "temperature": chosen.choice((0.07, 0.1, 1.0)),
        "eps": chosen.choice((1e-7, 0.0, 0.1)),
        "normalizers": chosen.choice(
            (None, torch.tensor([40.0, 3.0]).double(), torch.tensor([0.0, 17.0]).double())
        ),
    }
    found = gradients(crd_loss, *tensors, weight=0.5, **options)
    wanted = gradients(by_hand, *tensors, **options)
    wanted = [0.5 * wanted[0], wanted[1], 0.5 * wanted[2], 0.5 * wanted[3]]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_chunks_of_samples_against_the_whole_bank_are_one(monkeypatch):
    tensors = case(n=130, k=6, size=20)
    once = gradients(fastkd.crd_loss, *tensors)
    monkeypatch.setattr("fastkd.ops.crd.NUMBERS", 1)
    torch.testing.assert_close(gradients(fastkd.crd_loss, *tensors), once, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_computed_in_float32(dtype):
    tensors = case(n=8, k=30, size=100, width=16, dtype=dtype)
    found = gradients(fastkd.crd_loss, *tensors)
    exact = gradients(by_hand, *(x.double() if x.is_floating_point() else x for x in tensors))
    assert [x.dtype for x in found] == [torch.float32, torch.float32, dtype, dtype]
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=0)
    for got, want in zip(found[2:], exact[2:], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastkd.crd_loss(*tensors)[0], found[0])


def test_a_small_probability_keeps_its_digits_in_float32():
    """P of about 1e-8 beside K / M: in the published form their sum is rounded to K / M."""
    tensors = case(n=3, k=90, size=300, width=8, dtype=torch.float32)
    options = {"normalizers": torch.tensor([1e13, 1e13])}
    found = gradients(fastkd.crd_loss, *tensors, **options)
    exact = gradients(by_hand, *(x.double() if x.is_floating_point() else x for x in tensors), **options)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=3e-7, atol=0)
    torch.testing.assert_close(found[2].double(), exact[2], rtol=1e-4, atol=1e-6)


def test_a_teacher_and_banks_under_inference_mode_are_constants():
    student = unit(torch.randn(4, 6)).requires_grad_()
    constants = [*(unit(torch.randn(n, 6)) for n in (4, 9, 9)), torch.randint(9, (4, 5))]
    with torch.inference_mode():
        made = [x.clone() for x in constants]
    found = [torch.autograd.grad(fastkd.crd_loss(student, *x)[0], student) for x in (made, constants)]
    assert torch.equal(*(x for (x,) in found))


def test_only_wanted_gradients_are_computed_and_one_only():
    student, teacher, *rest = case()
    student.requires_grad_()
    given = torch.zeros(2, dtype=torch.float64)
    found = torch.ops.fastkd.crd_loss(student.detach(), teacher, *rest, given, 0.07, 1e-7, 1.0, True, False)
    assert found[2].shape == student.shape and found[3].numel() == 0
    loss, normalizers = fastkd.crd_loss(student, teacher, *rest)
    assert not normalizers.requires_grad
    (grad,) = torch.autograd.grad(loss, student, torch.tensor(-3.0, dtype=torch.float64), create_graph=True)
    torch.testing.assert_close(grad.detach(), -3 * found[2])
    with pytest.raises(RuntimeError, match=r"fastkd\.reference\.crd_loss"):
        grad.sum().backward()

    def fixed(s, t):  # found in the call, normalizers are constants that a difference quotient would move
        return fastkd.crd_loss(s, t, *rest, normalizers=(30.0, 20.0), temperature=0.5)[0]

    assert torch.autograd.gradcheck(fixed, (student, teacher.requires_grad_()))
    single = [x.detach().float() for x in (student, teacher, *rest[:2])]
    torch.library.opcheck(
        torch.ops.fastkd.crd_loss, (*single, rest[2], given.float(), 0.07, 1e-7, 1.0, True, True)
    )


def test_it_is_one_graph():
    student, teacher, *rest = case(dtype=torch.float32)

    def step(student, teacher):
        return fastkd.crd_loss(student * 1, teacher, *rest, weight=0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, student, teacher), gradients(step, student, teacher))


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("size", [9, 4000], ids=["whole", "gathered"])
def test_transposed_embeddings_have_gradients_as_graphs_expect(backend, size):
    """A graph is made for the strides that fakes tell."""
    vectors = case(6, 5, size, 4, torch.float32)
    student, teacher = (x.T.contiguous().T for x in vectors[:2])
    assert student.stride() == (1, 6)
    given = torch.zeros(2)
    with fastkd.use_backend(backend):
        torch.library.opcheck(
            torch.ops.fastkd.crd_loss,
            (student, teacher, *vectors[2:], given, 0.07, 1e-7, 1.0, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )
        made = torch.ops.fastkd.crd_loss(student, teacher, *vectors[2:], given, 0.07, 1e-7, 1.0, True, True)
    assert all(x.is_contiguous() for x in made[2:])


@pytest.mark.slow
def test_inductor_runs_it_over_transposed_embeddings():
    vectors = case(64, 5, 90, 128, torch.float32)
    w = vectors[0].T.contiguous().requires_grad_()

    def step(w):
        return fastkd.crd_loss(torch.nn.functional.normalize(w.T), *vectors[1:])[0]

    (wanted,) = torch.autograd.grad(step(w), w)
    (found,) = torch.autograd.grad(torch.compile(step)(w), w)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("size", "k"), [(8192, 2000), (60_000, 700)], ids=["whole", "gathered"])
def test_memory_is_that_of_scores(size, k):
    """The drawn rows of a bank would take 64 and 22 MB here; all scores are 2 MB in the first, a chunk of
    rows 16 MB in the second.
    """
    student, teacher, *rest = case(64, k, size, 128, torch.float32)
    student.requires_grad_()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        fastkd.crd_loss(student, teacher, *rest)[0].backward()
    held = peak = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 2**19 < peak < (12 if size == 8192 else 21) * 2**20


@forms
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"student": torch.ones(3)}, ValueError, r"student .* wanted \(N, D\)"),
        ({"teacher": torch.ones(4, 2)}, ValueError, "teacher .* wanted the same shape"),
        ({"student": torch.ones(4, 3).long()}, TypeError, "student .*wanted float16"),
        ({"teacher": [1.0]}, TypeError, "teacher is list, wanted a tensor"),
        (
            {"student_bank": torch.ones(8, 3)},
            ValueError,
            r"student_bank is \(8, 3\).*teacher_bank is \(9, 3\)",
        ),
        (
            {"student_bank": torch.ones(9, 2), "teacher_bank": torch.ones(9, 2)},
            ValueError,
            "wanted the same width",
        ),
        ({"rows": torch.full((4, 6), 9)}, ValueError, "rows has 9, wanted rows 0 to 8 of the bank"),
        ({"rows": torch.full((4, 6), -1)}, ValueError, "rows has -1, wanted rows 0 to 8"),
        ({"rows": torch.zeros(4, 1).long()}, ValueError, r"rows .* wanted \(4, K \+ 1\)"),
        ({"rows": torch.zeros(3, 6).long()}, ValueError, r"rows .* wanted \(4, K \+ 1\)"),
        ({"rows": torch.zeros(4, 6)}, TypeError, "rows .* wanted int64"),
        ({"rows": None}, TypeError, "rows is NoneType, wanted a tensor"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, wanted a finite number above 0"),
        ({"temperature": 0.001}, ValueError, r"temperature is 0.001, wanted at least 0.0014"),
        ({"normalizers": (1.0,)}, ValueError, "normalizers has 1 numbers, wanted two"),
        ({"normalizers": torch.ones(3)}, ValueError, "normalizers .* wanted two numbers"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"weight": float("nan")}, ValueError, "weight is nan"),
    ],
)
def test_bad_input_is_one_line(crd_loss, change, error, words):
    names = ("student", "teacher", "student_bank", "teacher_bank", "rows")
    arguments = {**dict(zip(names, case(), strict=True)), **change}
    with pytest.raises(error, match=words) as caught:
        crd_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_the_momentum_of_an_update_is_the_share_of_the_old_row():
    student, teacher, *banks, _ = case()
    module, index = fastkd.CRD(*banks), torch.tensor([7, 0, 3, 5])
    module.update(index, student, teacher, torch.ones(2), momentum=0.9)
    rest = torch.tensor([1, 2, 4, 6, 8])
    sides = zip((module.student_bank, module.teacher_bank), banks, (student, teacher), strict=True)
    for found, old, new in sides:
        torch.testing.assert_close(found[index], unit(0.9 * old[index] + 0.1 * new), rtol=1e-12, atol=0)
        assert torch.equal(found[rest], old[rest])


def test_an_update_of_what_is_no_row_is_one_line():
    module, rows = fastkd.CRD(torch.rand(5, 3), torch.rand(5, 3)), torch.rand(1, 3)
    before = module.student_bank.clone()
    for index, error, words in (
        (torch.tensor([-1]), ValueError, "index has -1, wanted rows 0 to 4 of the bank"),  # not the last row
        (torch.tensor([5]), ValueError, "index has 5, wanted rows 0 to 4 of the bank"),
        (torch.tensor([1, 2]), ValueError, r"index is \(2,\) int64 on cpu, wanted \(1,\)"),
        ([1], TypeError, "index is list, wanted a tensor"),
    ):
        with pytest.raises(error, match=f"^{words}"):
            module.update(index, rows, rows, torch.ones(2))
    assert torch.equal(module.student_bank, before)
