"""CRD as a method: its negatives, its banks, its state, its presets."""

from __future__ import annotations

import io
import math

import pytest
import torch
from crd_cases import by_hand, case, unit
from torch import nn

import fastkd
from fastkd.methods import BuildContext, create_method, define
from fastkd.models import create_model

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
        *networks, "crd", options={"crd": {"k": 4, "momentum": 0.75}}, train_labels=LABELS, fold=False
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
        torch.testing.assert_close(bank[index], unit(0.75 * before[index] + 0.25 * found.detach()))
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
        (torch.tensor([0, -1, 2]), "train_labels has -1, wanted classes from 0 on"),
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
        (torch.tensor([0, -1]), "index has -1, wanted rows 0 to 11 of the bank"),  # not the last row
    ):
        with pytest.raises(ValueError, match=words):
            distillation(torch.randn(2, 3, 32, 32), None, index)
    bank, rows = distillation.methods["crd"].function.student_bank.clone(), torch.ones(1, 128)
    with pytest.raises(ValueError, match="index has -1, wanted rows 0 to 11 of the bank"):
        distillation.update(torch.tensor([-1]), {"crd": (rows, rows, torch.ones(1, 2))})
    assert torch.equal(distillation.methods["crd"].function.student_bank, bank)
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


def test_of_an_image_that_occurs_twice_the_last_row_stays():
    """Several threads write in any order, so what they write to one row must be the same."""
    written = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "index_put" in str(function):
                written.append((args[1][0], args[2]))
            return function(*args, **(kwargs or {}))

    torch.manual_seed(0)
    banks = [torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2)]
    loss, index = fastkd.CRD(*banks), torch.tensor([3, 1, 3, 5, 1, 3])
    students, teachers = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    before = loss.student_bank.clone(), loss.teacher_bank.clone()
    with Watch():
        loss.update(index, students, teachers, torch.ones(2))
    assert len(written) == 2
    for places, rows in written:
        for place in index.unique():
            assert len(rows[places == place].unique(dim=0)) == 1
    for bank, old, rows in zip((loss.student_bank, loss.teacher_bank), before, (students, teachers)):
        for place, row in ((3, rows[5]), (1, rows[4]), (5, rows[3])):
            torch.testing.assert_close(
                bank[place], torch.nn.functional.normalize((old[place] + row) / 2, dim=0)
            )
        assert torch.equal(bank[[0, 2, 4]], old[[0, 2, 4]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_normalizers_of_banks_in_half_precision_are_in_float32(dtype):
    """Of 50,000 rows one is above 50,000 times the mean of exponentials: float16 ends at 65504."""
    torch.manual_seed(0)
    banks = [unit(torch.randn(50_000, 8)).to(dtype) for _ in range(2)]
    rows = torch.randint(50_000, (4, 101))
    embeddings = [unit(torch.randn(4, 8)) for _ in range(2)]
    loss = fastkd.CRD(*banks)
    assert loss.normalizers.dtype == torch.float32
    _, found = loss(*embeddings, rows)
    loss.update(torch.arange(4), *embeddings, found)
    assert torch.equal(loss.normalizers, found) and found.min() > 65504


@pytest.mark.parametrize("move", ["half", "bfloat16"])
def test_normalizers_stay_in_float32_where_the_module_goes_to_half_precision(move):
    banks, given = [unit(torch.randn(6, 4)) for _ in range(2)], (1.5e5, 2.5e5)
    loss = fastkd.CRD(*banks, normalizers=given)
    whole = torch.nn.ModuleList([loss, torch.nn.Linear(2, 2)])
    getattr(whole, move)()
    assert loss.student_bank.dtype == whole[1].weight.dtype != torch.float32
    assert loss.normalizers.dtype == torch.float32 and loss.normalizers.tolist() == list(given)
    assert "normalizers" in dict(loss.named_buffers()) and "0.normalizers" in whole.state_dict()
    assert loss.to("meta").normalizers.is_meta


def test_normalizers_are_in_float64_where_a_bank_is():
    banks = [unit(torch.randn(6, 4)) for _ in range(2)]
    assert fastkd.CRD(banks[0].double(), banks[1]).normalizers.dtype == torch.float64
    assert fastkd.CRD(banks[0], banks[1].double()).normalizers.dtype == torch.float64
    assert fastkd.CRD(*banks).double().normalizers.dtype == torch.float64


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_an_image_that_occurs_twice_the_last_row_stays_in_a_compiled_update(dtype):
    """Of rows in bfloat16 for a bank in float32, too, which compiled kernels would take as they are."""
    torch.manual_seed(0)
    banks = [unit(torch.randn(40, 128)) for _ in range(2)]
    rows, index = [unit(torch.randn(1024, 128)).to(dtype) for _ in range(2)], torch.randint(0, 30, (1024,))
    loss = fastkd.CRD(*banks)
    torch.compile(loss.update, fullgraph=True)(index, *rows, torch.ones(2))
    last = {int(place): i for i, place in enumerate(index)}
    for bank, old, found in zip((loss.student_bank, loss.teacher_bank), banks, rows, strict=True):
        places = torch.tensor([*last])
        wanted = unit((old[places] + found[torch.tensor([*last.values()])].float()) / 2)
        torch.testing.assert_close(bank[places], wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(bank[30:], old[30:]) and bank.dtype == torch.float32
    torch.compiler.reset()


def test_a_row_of_minus_one_is_refused_in_a_compiled_step_too(cpp):
    """By the compiled kernel: the graph itself has no check in it."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3)) for _ in range(2))
    # of two images the one is the other's only negative, so that nothing is left to be drawn
    given = {"train_labels": torch.tensor([0, 1]), "options": {"crd": {"k": 1}}, "image_shape": (3, 2, 2)}
    made = fastkd.Distillation(student, teacher, "crd", **given)
    images, labels = torch.randn(2, 3, 2, 2), torch.tensor([1, 0])
    last, behind = torch.tensor([1, 0]), torch.tensor([-1, 0])
    with pytest.raises(ValueError, match="index has -1, wanted rows 0 to 1"):
        made(images, labels, behind)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with fastkd.use_backend(cpp):
        torch.testing.assert_close(compiled(images, labels, last).total, made(images, labels, last).total)
        with pytest.raises(ValueError, match="rows has -1, wanted rows 0 to 1 of the bank"):
            compiled(images, labels, behind)
