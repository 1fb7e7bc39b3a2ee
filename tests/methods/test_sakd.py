"""SAKD against an independent form and its worked figures; its connectors, its recipe, and a run of it."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from autograd_cases import gradients
from record_files import rows_of

import fastkd
from fastkd import methods, native, reference
from fastkd.methods import BuildContext, create_method
from fastkd.methods.sakd import Connector
from fastkd.models import create_model
from fastkd.training import Trainer

FORMS = [fastkd, reference]
forms = pytest.mark.parametrize("form", FORMS, ids=["fused", "reference"])


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def map_by_hand(x):
    """By sums and exponentials, each softmax on its own."""
    g = sum(x.double().unbind(1)[i] ** 2 for i in range(x.shape[1])) / x.shape[1]
    powers = torch.exp((g[:, :, None] * g[:, None]).sum(3))
    columns, rows = powers / powers.sum(1, keepdim=True), powers / powers.sum(2, keepdim=True)
    return g + (columns * g + rows * g) / math.sqrt(g.shape[2])


def loss_by_hand(student, teacher, weights):
    total = 0.0
    for s, t, weight in zip(student, teacher, weights, strict=True):
        unit = [o / (o * o).sum((1, 2), keepdim=True).sqrt() for o in (map_by_hand(s), map_by_hand(t))]
        total = total + weight * ((unit[0] - unit[1]) ** 2).sum() / unit[0].numel()
    return total


STUDENT = 4 * worked((2, 2, 4, 4), 3), 4 * worked((2, 2, 2, 2), 7)
TEACHER = 4 * worked((2, 3, 4, 4), 5), 4 * worked((2, 2, 2, 2), 6)


@forms
def test_the_worked_figures(form):
    found = form.sakd_map(STUDENT[0])
    assert found.dtype == torch.float64 and abs(found[1, 2, 3].item() - 2.5796549744) <= 5e-11
    assert abs(form.sakd_loss(STUDENT, TEACHER, weight=1.0).item() - 0.1127944016) <= 5e-11
    connected = []
    for x, weight in zip(STUDENT, (worked((3, 2), 5), worked((2, 2), 4)), strict=True):
        connector = Connector(x.shape[1], len(weight)).double()
        connector[0].weight.data.copy_(weight[..., None, None])
        connected.append(connector(x))
    assert abs(form.sakd_loss(connected, TEACHER).item() / 200 - 0.1238321431) <= 5e-11


@forms
@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(form, seed):
    chosen = random.Random(seed)
    n, count = chosen.choice((2, 3, 5)), chosen.choice((1, 2, 3))
    sizes = [chosen.choice((2, 3, 5)) for _ in range(count)]
    sides = [
        [torch.randn(n, chosen.choice((1, 2, 3, 7)), size, size, dtype=torch.float64) for size in sizes]
        for _ in range(2)
    ]
    weights = chosen.choice((None, [chosen.uniform(-1, 2) for _ in sizes]))
    factors = weights or [1 / 2 ** (count - i) for i in range(1, count + 1)]
    found = gradients(
        lambda *x: form.sakd_loss(x[:count], x[count:], weights=weights, weight=3.0), *sides[0], *sides[1]
    )
    wanted = gradients(lambda *x: 3.0 * loss_by_hand(x[:count], x[count:], factors), *sides[0], *sides[1])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    upstream = torch.randn(n, sizes[0], sizes[0], dtype=torch.float64)
    found, wanted = (
        gradients(lambda x, map=map: (map(x) * upstream).sum(), sides[0][0])
        for map in (form.sakd_map, map_by_hand)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_computed_in_float32(dtype):
    """Squares of 400 and more are infinite in float16, and so are their products."""
    student, teacher = (
        [scale * torch.randn(3, c, size, size) for c, size in ((2, 5), (4, 3))]
        for c, scale in ((1, 400), (2, 1))
    )
    student, teacher = [x.to(dtype) for x in student], [x.to(dtype) for x in teacher]
    found = gradients(lambda a, b: fastkd.sakd_loss([a, b], teacher), *student)
    exact = gradients(
        lambda a, b: reference.sakd_loss([a, b], [x.double() for x in teacher]),
        *(x.double() for x in student),
    )
    assert found[0].dtype == torch.float32 and [x.dtype for x in found[1:]] == [dtype] * 2
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(found[1:], exact[1:], strict=True):
        atol = 6e-8 if dtype == torch.float16 else 1e-9  # its smallest number
        torch.testing.assert_close(
            got.double(), want, rtol=1e-3 if dtype == torch.float32 else 1e-2, atol=atol
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(fastkd.sakd_loss(student, teacher), found[0])
            and fastkd.sakd_map(student[0]).dtype == torch.float32
        )
    mixed, exact = (
        loss(x, teacher[0].double())
        for loss, x in ((fastkd.sakd_loss, student[0]), (reference.sakd_loss, student[0].double()))
    )
    torch.testing.assert_close(mixed, exact, rtol=1e-12, atol=0)  # all in float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(40, 32, 16, 16), (40, 35, 15, 15)], ids=["whole lines", "others"])
def test_every_way_through_memory_gives_the_same_bits(each_path, memory_plan, shape, layout):
    """Gradients of more than 1 MiB, for which the ways differ; their rows begin a line or not."""
    sides = [torch.randn(shape).to(memory_format=layout) for _ in range(2)]
    exact = gradients(reference.sakd_loss, *(x.double() for x in sides))
    for _ in each_path:
        found = []
        for plan in native.MEMORY_PLANS:
            memory_plan(plan)
            found.append(gradients(fastkd.sakd_loss, *sides))
        assert len(found) == 2 and all(map(torch.equal, *found))
        for got, want in zip(found[0], exact, strict=True):
            largest = want.abs().max().item()
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * largest)


def test_first_and_second_derivatives():
    student, teacher = (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fastkd.sakd_map, (student,)) and torch.autograd.gradcheck(
        fastkd.sakd_loss, (student, teacher)
    )
    assert torch.autograd.gradgradcheck(reference.sakd_loss, (student, teacher))
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert not torch.autograd.grad(fastkd.sakd_loss(dead, torch.rand(2, 3, 4, 4)), dead)[0].any()


def test_it_is_one_graph():
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)

    def step(student, teacher):
        return fastkd.sakd_loss([student * 2], [teacher], weight=0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(lambda s: compiled(s, teacher), student), gradients(lambda s: step(s, teacher), student)
    )


@forms
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"student": torch.ones(2, 3, 4, 5)},
            ValueError,
            r"student\[0\] is \(2, 3, 4, 5\) .*wanted a square map \(N, C, H, H\)",
        ),
        ({"teacher": torch.ones(2, 3, 4)}, ValueError, r"teacher\[0\] is \(2, 3, 4\) .*wanted a square map"),
        (
            {"teacher": torch.ones(2, 3, 5, 5)},
            ValueError,
            r"student\[0\] is .*teacher\[0\] is .*sizes differ, SAKD wanted the same H",
        ),
        ({"teacher": torch.ones(3, 3, 4, 4)}, ValueError, "batch sizes differ"),
        ({"teacher": [torch.ones(2, 3, 4, 4)] * 2}, ValueError, "student has 1 stages, teacher has 2"),
        ({"student": torch.ones(2, 3, 4, 4).long()}, TypeError, "student is .*wanted float16"),
        ({"weights": [1, 2]}, ValueError, "weights has 2 numbers, wanted 1, one a stage"),
        ({"weight": float("nan")}, ValueError, "weight is nan"),
    ],
)
def test_bad_input_is_one_line(form, change, error, words):
    arguments = {"student": torch.ones(2, 3, 4, 4), "teacher": torch.ones(2, 3, 4, 4), **change}
    with pytest.raises(error, match=words) as caught:
        form.sakd_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"x is \(2, 3, 4, 5\) .*wanted a square map"):
        form.sakd_map(torch.ones(2, 3, 4, 5))


@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "wrn_16_2"), ("wrn_16_1", "resnet8x4"), ("resnet8", "resnet8")]
)
def test_the_method_connects_the_students_stages(student, teacher):
    torch.manual_seed(2)
    networks = create_model(student, 7), create_model(teacher, 7)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    distillation = fastkd.Distillation(
        *networks, "sakd", teacher_mode="train", options={"sakd": {"beta": 20.0}}
    )
    losses = distillation(images, labels)
    assert list(losses.terms) == ["ce", "sakd", "kd"]
    # train mode, both
    s, t = ([x.detach() for x in network(images, features=True)[0].stages] for network in networks)
    connected = []
    for x, target, connector in zip(s, t, distillation.methods["sakd"].connectors, strict=True):
        weight = connector[0].weight
        assert connector[0].bias is None and weight.shape == (target.shape[1], x.shape[1], 1, 1)
        y = F.conv2d(x, weight)
        connected.append(F.batch_norm(y, None, None, training=True))
    wanted = 20 * reference.sakd_loss(connected, t, weight=1.0)
    torch.testing.assert_close(losses.terms["sakd"], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        losses.terms["kd"], fastkd.kd_loss(losses.student_logits, losses.teacher_logits, 4.0, weight=0.9)
    )
    losses.total.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for p in (networks[0].conv1.weight, *distillation.methods.parameters())
    )
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distillation(images, labels).terms["sakd"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, wanted, rtol=0.1, atol=0.05)


def test_connectors_begin_as_published():
    context = BuildContext.of(create_model("resnet8"), create_model("resnet8x4"))
    method = create_method("sakd", context)
    for connector, width in zip(method.connectors, (64, 128, 256), strict=True):
        assert connector[0].weight.std().item() == pytest.approx(math.sqrt(2 / width), rel=0.15)
        assert connector[1].weight.eq(1).all() and not connector[1].bias.any()


def test_what_its_authors_train_with_comes_with_it():
    base = {"momentum": 0.9, "new_optimizer": False, "teacher_mode": "eval"}
    for name in ("sakd", "sakd+kd"):
        found = methods.define(name, preset="hankyul2")
        assert found.names == ("ce", "sakd", "kd") and found.terms[1].options.weight == 0.9 and found.ce == 1
        assert found.recipe(base, ()) == {"momentum": 0.8, "new_optimizer": True, "teacher_mode": "train"}
    assert methods.define("sakd", options={"kd": {"weight": 0.5}}).terms[1].options.weight == 0.5
    with pytest.raises(ValueError, match="momentum is left open"):
        methods.define("at+sakd", preset="sakd").recipe(base, ())


def test_a_run_is_taken_up_and_an_explicit_recipe_wins(small_main, monkeypatch, tmp_path, capsys):
    flags = (
        "--method sakd --dataset digits --teacher resnet8 --student resnet8 --epochs 2 --device cpu".split()
    )
    flags += ["--no-pictures"]
    assert small_main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert (
        "momentum 0.8" in (out := capsys.readouterr().out)
        and "new_optimizer True" in out
        and "teacher_mode train" in out
    )
    whole = Trainer.train_epoch

    def stopped(self, number, progress):
        if number == 2 and "sakd" in self.method:
            raise KeyboardInterrupt
        whole(self, number, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", stopped)
        assert small_main([*flags, "--output", str(tmp_path / "parts")]) == 130
    assert small_main([*flags, "--output", str(tmp_path / "parts"), "--resume"]) == 0
    states = []
    for output in ("whole", "parts"):
        folder = tmp_path / output / rows_of(tmp_path / output)[-1]["folder"]
        states.append(torch.load(folder / "last.pt", weights_only=True))
    for key in ("model", "method", "teacher", "best"):
        torch.testing.assert_close(states[1][key], states[0][key], rtol=0, atol=0)
    assert (
        "sakd.connectors.2.1.running_mean" in states[0]["method"]
        and states[0]["method"]["sakd.connectors.2.1.running_mean"].any()
    )
    capsys.readouterr()
    assert small_main([*flags, "--recipe", "digits", "--output", str(tmp_path / "recipe")]) == 0
    (config,) = (tmp_path / "recipe").glob("sakd-*/config.json")
    assert json.loads(config.read_text())["fields"]["momentum"] == 0.9
    assert small_main([*flags, "--student", "resnet_32_20", "--output", str(tmp_path / "misfit")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "student's stage 1 is (16, 28, 28), teacher's is (16, 32, 32)" in err
