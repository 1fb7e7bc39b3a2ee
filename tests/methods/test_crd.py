"""CRD against an independent form and its worked figures; what its negatives are, and what its banks hold."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch

import fastkd
from fastkd import reference
from fastkd.methods import BuildContext, create_method, define
from fastkd.models import create_model

FORMS = [fastkd.crd_loss, reference.crd_loss]
forms = pytest.mark.parametrize("crd_loss", FORMS, ids=["fused", "reference"])


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def unit(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def by_hand(student, teacher, student_bank, teacher_bank, rows, temperature=0.07, normalizers=None, eps=1e-7):
    """Score by score in Python, with the logarithms as they are published; gradients by autograd. (loss,
    normalizers).
    """
    n, k, size = len(rows), rows.shape[1] - 1, len(student_bank)
    total, found = 0, []
    for i, (x, bank) in enumerate(((student, teacher_bank), (teacher, student_bank))):
        odds = [
            [torch.exp(torch.dot(x[b], bank[row]) / temperature) for row in rows[b].tolist()]
            for b in range(n)
        ]
        z = 0 if normalizers is None else float(normalizers[i])
        if not z > 0:
            z = sum(odd.item() for row in odds for odd in row) / (n * (k + 1)) * size
        for first, *rest in odds:
            total = total - torch.log(first / z / (first / z + k / size + eps))
            for odd in rest:
                total = total - torch.log(k / size / (odd / z + k / size + eps))
        found.append(z)
    return total / n, torch.tensor(found, dtype=torch.float64)


def case(n=4, k=5, size=9, width=3, dtype=torch.float64, seed=0):
    """(student, teacher, both banks, rows)."""
    made = torch.Generator().manual_seed(seed)
    vectors = [
        unit(torch.randn(count, width, generator=made, dtype=torch.float64)).to(dtype)
        for count in (n, n, size, size)
    ]
    return (*vectors, torch.randint(size, (n, k + 1), generator=made))


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


LABELS = torch.tensor([0, 1, 2, 2, 0, 2, 1, 2, 2, 1, 0, 2])


def method_of(labels=LABELS, seed=0, **options):
    context = BuildContext.of(create_model("resnet8", 7), create_model("resnet8x4", 7), train_labels=labels)
    return create_method("crd", context, options={"crd": options}, seed=seed)


@pytest.mark.parametrize("k", [1, 4, 6, 7, 30])
def test_negatives_are_of_other_classes_and_differ_while_there_are_enough(k):
    method, everyone = method_of(k=k), torch.arange(len(LABELS))
    seen = []
    for epoch in range(40):
        method.set_epoch(epoch, 40)
        rows = method.draw(everyone)
        assert rows.shape == (12, k + 1) and torch.equal(rows[:, 0], everyone)
        assert (LABELS[rows[:, 1:]] != LABELS[:, None]).all()
        if k <= 6:  # the images of other classes, of those in the largest one
            assert all(len(set(row)) == k for row in rows[:, 1:].tolist())
        some = torch.tensor([7, 2, 0])
        assert torch.equal(method.draw(some), rows[some])  # whatever the batch
        seen.append(rows[:, 1:])
    assert not torch.equal(seen[0], seen[1])
    method.set_epoch(0, 40)
    assert torch.equal(method.draw(everyone)[:, 1:], seen[0]) and not torch.equal(
        method_of(k=k, seed=1).draw(everyone)[:, 1:], seen[0]
    )
    drawn = torch.stack([torch.bincount(torch.stack(seen)[:, i].flatten(), minlength=12) for i in range(12)])
    others = LABELS[:, None] != LABELS
    expected = 40 * k / others.sum(1, keepdim=True)
    # each image is drawn as often as another: chi-squared over all pairs
    chi = (((drawn - expected) ** 2 / expected) * others).sum() / others.sum()
    assert (drawn * ~others).sum() == 0 and chi < 1.5


def test_the_positive_may_be_another_of_the_class():
    method, everyone = method_of(k=3, positive="relax"), torch.arange(len(LABELS))
    found = []
    for epoch in range(30):
        method.set_epoch(epoch, 30)
        found.append(method.draw(everyone)[:, 0])
    assert (LABELS[torch.stack(found)] == LABELS).all()
    for label, column in zip(LABELS, torch.stack(found, 1), strict=True):
        assert {*column.tolist()} == {*everyone[label == LABELS].tolist()}


def test_a_step_of_the_method_its_banks_and_its_normalizers():
    torch.manual_seed(1)
    networks = create_model("resnet8", 7), create_model("resnet8x4", 7)
    distillation = fastkd.Distillation(
        *networks, "crd", options={"crd": {"k": 4}}, train_labels=LABELS, fold=False
    ).eval()
    method, images, index = distillation.methods["crd"], torch.randn(3, 3, 32, 32), torch.tensor([8, 0, 3])
    assert method.settled == {} and list(method.function.student_bank.shape) == [12, 128]
    banks = [bank.clone() for bank in (method.function.student_bank, method.function.teacher_bank)]
    bound = math.sqrt(3 / 128)
    assert all(0.9 * bound < bank.abs().max() <= bound and bank.mean().abs() < 0.2 * bound for bank in banks)
    losses = distillation(images, LABELS[index], index)
    units = [
        unit(layer(network(images, features=True)[0].pooled))
        for layer, network in zip(method.embeddings, networks, strict=True)
    ]
    wanted, normalizers = by_hand(*units, *banks, method.draw(index))
    torch.testing.assert_close(losses.terms["crd"].double(), 0.8 * wanted.double(), rtol=1e-5, atol=0)
    losses.total.backward()
    assert all(layer.weight.grad.any() for layer in method.embeddings) and networks[0].conv1.weight.grad.any()
    record = losses.records["crd"]
    assert [x.shape for x in record] == [(3, 128), (3, 128), (3, 2)] and not any(
        x.requires_grad for x in record
    )
    distillation.update(index, losses.records)
    torch.testing.assert_close(method.function.normalizers.double(), normalizers, rtol=1e-5, atol=0)
    for bank, before, found in zip(
        (method.function.student_bank, method.function.teacher_bank), banks, units, strict=True
    ):
        torch.testing.assert_close(bank[index], unit(0.5 * before[index] + 0.5 * found.detach()))
        untouched = [i for i in range(12) if i not in index]
        assert torch.equal(bank[untouched], before[untouched])
    kept = method.function.normalizers.clone()
    distillation.update(index, {"crd": (*record[:2], record[2] * 3)})
    assert torch.equal(method.function.normalizers, kept)


def test_what_the_state_holds_goes_on_bit_for_bit():
    networks = [create_model("resnet8", 7) for _ in range(2)]
    both = [
        fastkd.Distillation(*networks, "crd", train_labels=LABELS, fold=False, seed=seed).eval()
        for seed in (0, 0)
    ]
    images, index = torch.randn(4, 3, 32, 32), torch.tensor([1, 5, 2, 9])
    both[0].set_epoch(0, 2)
    both[0].update(index, both[0](images, None, index).records)
    file = io.BytesIO()
    torch.save(both[0].state_dict(), file)
    assert [name for name in both[0].state_dict() if name.startswith("methods.crd.function")] == [
        f"methods.crd.function.{name}" for name in ("student_bank", "teacher_bank", "normalizers")
    ]
    both[1].load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    found = []
    for distillation in both:
        distillation.set_epoch(1, 2)
        losses = distillation(images, None, index)
        distillation.update(index, losses.records)
        found.append([losses.total, *distillation.methods["crd"].buffers()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_under_autocast_and_there_as_one_graph(graph):
    torch.manual_seed(2)
    networks = create_model("resnet8", 7), create_model("resnet8x4", 7)
    cast = torch.autocast("cpu", torch.bfloat16)
    distillation = fastkd.Distillation(*networks, "crd", train_labels=LABELS, autocast=cast, fold=False)
    images, index = torch.randn(4, 3, 32, 32), torch.tensor([1, 5, 2, 9])
    losses = distillation(images, LABELS[index], index)
    assert losses.terms["crd"].dtype == torch.float32 and losses.records["crd"][0].dtype == torch.float32
    if graph:
        eager, compiled = losses, torch.compile(distillation, fullgraph=True, backend="aot_eager")
        losses = compiled(images, LABELS[index], index)
        torch.testing.assert_close(eager.total, losses.total, rtol=2e-2, atol=1e-2)
    losses.total.backward()
    assert all(x.grad.isfinite().all() for x in distillation.parameters())


def test_what_it_cannot_do_is_one_line():
    for labels, words in (
        (None, "train_labels is None"),
        (torch.zeros(5).long(), "train_labels has 1 class, wanted at least two"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            method_of(labels)
        assert "\n" not in str(caught.value)
    distillation = fastkd.Distillation(
        *(create_model("resnet8", 7) for _ in range(2)), "crd", train_labels=LABELS, fold=False
    )
    for index, words in (
        (None, "index is None, wanted where"),
        (torch.tensor([0, 12]), "index has 12, wanted rows 0 to 11 of the bank"),
    ):
        with pytest.raises(ValueError, match=words):
            distillation(torch.randn(2, 3, 32, 32), None, index)
    for options, words in (
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
    ):
        with pytest.raises(ValueError, match=f"option crd: {words}, wanted"):
            define("crd", options={"crd": options})


def test_presets_and_what_they_leave_open():
    temperatures = {
        name: define("crd", preset=name).terms[0].options.temperature
        for name in ("repdistiller", "mdistiller", "kdzoo")
    }
    assert temperatures == {"repdistiller": 0.07, "mdistiller": 0.07, "kdzoo": 0.1}
    assert define("kd+crd+at", preset="repdistiller").names == ("ce", "at", "crd", "kd")
    both = define("crd+kd", preset="repdistiller")
    assert both.ce == 1 and [term.options for term in both.terms][1].weight == 1
    for classes, beta in ((10, 0.2), (7, 0.8)):
        context = BuildContext.of(
            *(create_model("resnet8", classes) for _ in range(2)), train_labels=torch.arange(600) % classes
        )
        method = create_method("crd", context, preset="kdzoo")
        assert (
            method.settled == {"beta": beta, "k": 200}
            and method.function.weight == beta
            and method.function.temperature == 0.1
        )
    banks = case()[2:4]
    module = fastkd.CRD.preset("kdzoo", student_bank=banks[0], teacher_bank=banks[1])
    assert module.temperature == 0.1 and module.weight == 0.8 and "temperature=0.1" in module.extra_repr()
