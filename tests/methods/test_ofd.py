"""OFD against an independent form and its worked figures; its margins, and what does not fit it."""

from __future__ import annotations

import csv
import math
import random
from collections import OrderedDict
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastkd
from fastkd import reference
from fastkd.methods import BuildContext, create_method
from fastkd.methods.ofd import batch_margin
from fastkd.models import create_model, load_student
from fastkd.training.config import Config, Settings


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def by_hand(students, teachers, margins, weights):
    """Three masks in place of one, as another implementation writes it."""
    total = 0
    for s, t, margin, weight in zip(students, teachers, margins, weights, strict=True):
        m = margin.view(-1, *[1] * (t.dim() - 2)).expand_as(t)
        square = torch.zeros_like(t)
        square = square + (s - t) ** 2 * (t > 0)
        square = square + (s - t) ** 2 * ((t <= 0) & (t > m) & (s > t))
        square = square + (s - m) ** 2 * ((t <= m) & (s > m))
        total = total + weight * square.sum() / len(s)
    return total


def margin_by_hand(weight, bias):
    if weight == 0:
        return min(bias, 0.0)
    found = NormalDist(bias, abs(weight))
    return -3 * abs(weight) if found.cdf(0) <= 0.001 else bias - weight**2 * found.pdf(0) / found.cdf(0)


def gradients(loss, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = loss(*leaves)
    return [out, *torch.autograd.grad(out, leaves)]


def test_the_worked_figures():
    assert reference.ofd_margin is fastkd.ofd_margin
    weight, bias = (torch.tensor(x, dtype=torch.float64) for x in ((1.0, -0.5, 1.0), (0.2, -0.3, 4.0)))
    wanted = torch.tensor([-0.7294158481, -0.5295735683, -3.0], dtype=torch.float64)
    assert (fastkd.ofd_margin(weight, bias) - wanted).abs().max() <= 5e-11
    student, teacher = worked((2, 2, 2, 2), 3), worked((2, 2, 2, 2), 5)
    margins = torch.tensor([-0.1, -0.2], dtype=torch.float64)
    found = fastkd.ofd_loss(student, teacher, margins, weight=1.0)
    assert abs(2 * found.item() - 2.91) <= 5e-11  # the figure is the sum over the two samples
    stages = fastkd.ofd_loss([student] * 3, [teacher] * 3, [margins] * 3)
    assert stages.item() == pytest.approx(found.item() * 1.75 / 1000, rel=1e-14)


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    count, n = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 5))
    shapes = [
        (n, chosen.choice((1, 3, 7)), *(chosen.choice((1, 3, 5)) for _ in range(chosen.choice((1, 2, 3)))))
        for _ in range(count)
    ]
    students, teachers = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    margins = [-torch.rand(shape[1], dtype=torch.float64) for shape in shapes]
    weights = chosen.choice((None, [0.5 + i for i in range(count)]))
    used = [2.0 ** (i + 1 - count) for i in range(count)] if weights is None else weights
    pair = [*students, *teachers]
    found = gradients(
        lambda *x: fastkd.ofd_loss(x[:count], x[count:], margins, weights=weights, weight=0.25), *pair
    )
    wanted = gradients(lambda *x: 0.25 * by_hand(x[:count], x[count:], margins, used), *pair)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_margins_by_hand():
    pairs = [
        (0.0, 0.4),
        (0.0, -0.4),
        (1e-30, 1.0),
        (-1.0, 3.0902),
        (1.0, 3.0904),
        *((random.gauss(0, 1), random.gauss(0, 2)) for _ in range(40)),
    ]
    weight, bias = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = fastkd.ofd_margin(weight, bias)
    torch.testing.assert_close(
        found,
        torch.tensor([margin_by_hand(*pair) for pair in pairs], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )
    assert found.max() <= 0 and not math.copysign(1, found[2]) > 0
    half = fastkd.ofd_margin(weight.half(), bias.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), fastkd.ofd_margin(weight.half().double(), bias.half().double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_computed_in_float32(dtype):
    pair = [(100 * torch.randn(3, 5, 7, 6)).to(dtype) for _ in range(2)]
    margins = -torch.rand(5)
    found = gradients(lambda s, t: fastkd.ofd_loss(s, t, margins), *pair)
    wanted = gradients(
        lambda s, t: by_hand([s], [t], [margins.double()], [1e-3]), *(x.double() for x in pair)
    )
    assert found[0].dtype == torch.float32 and [x.dtype for x in found[1:]] == [dtype] * 2
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastkd.ofd_loss(*pair, margins), found[0])


def test_a_nan_is_not_masked_away():
    student = torch.full((1, 1, 2), float("nan"))
    assert fastkd.ofd_loss(student, -torch.ones(1, 1, 2), torch.tensor([-0.5])).isnan()


def test_the_module_is_one_graph_and_moves_its_margins():
    student, teacher = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    module = fastkd.OFD.preset("mdistiller", margins=-torch.rand(4), weight=0.5)
    compiled = torch.compile(lambda s: module(s * 2, teacher), fullgraph=True, backend="aot_eager")
    wanted = gradients(lambda s: fastkd.ofd_loss(s * 2, teacher, module.margin_0, weight=0.5), student)
    torch.testing.assert_close(gradients(compiled, student), wanted)
    assert module.double().margin_0.dtype == torch.float64 and [*module.state_dict()] == ["margin_0"]
    assert torch.autograd.gradcheck(module, (student.double(), teacher.double().requires_grad_()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"margins": [-torch.ones(3)]}, ValueError, "margins has 1, wanted 2, one a stage"),
        (
            {"margins": [-torch.ones(3), torch.tensor([-1.0, 0.5, 0.0])]},
            ValueError,
            r"margins\[1\] has 0.5, wanted numbers of at most 0",
        ),
        (
            {"margins": [-torch.ones(3), -torch.ones(2)]},
            ValueError,
            r"margins\[1\] is \(2,\) .* one number a channel",
        ),
        (
            {"margins": [-torch.ones(3), -torch.ones(3, 1)]},
            ValueError,
            r"margins\[1\] is \(3, 1\) .* wanted \(C,\)",
        ),
        ({"margins": [-torch.ones(3), [-1.0]]}, TypeError, r"margins\[1\] is list, wanted a tensor"),
        (
            {"student": [torch.ones(2, 3, 4), torch.ones(2, 3, 5)]},
            ValueError,
            r"student\[1\] .* teacher\[1\] .* shapes differ",
        ),
        ({"teacher": [torch.ones(2, 3, 4)]}, ValueError, "student has 2 stages, teacher has 1"),
        ({"weights": [1.0]}, ValueError, "weights has 1 numbers, wanted 2"),
        ({"weight": "x"}, TypeError, "weight is"),
        (
            {"student": torch.ones(2, 3, 4).long(), "teacher": torch.ones(2, 3, 4)},
            TypeError,
            "student is .* wanted float16",
        ),
    ],
)
def test_bad_input_is_one_line(change, error, words):
    pair = [torch.ones(2, 3, 4)] * 2
    arguments = {"student": pair, "teacher": pair, "margins": [-torch.ones(3)] * 2, **change}
    with pytest.raises(error, match=words) as caught:
        fastkd.ofd_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_margins_are_one_line():
    with pytest.raises(ValueError, match=r"weight is \(3,\) .*, bias is \(2,\) .*: wanted the same channels"):
        fastkd.ofd_margin(torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match="bias is float, wanted a tensor"):
        fastkd.ofd_margin(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"margins\[0\] has 2, wanted numbers of at most 0"):
        fastkd.OFD(2 * torch.ones(3))
    with pytest.raises(
        ValueError,
        match="student's stage 1 is .*28, 28.*, teacher's is .*32, 32.*: ofd wanted maps of one size",
    ):
        fastkd.Distillation(create_model("resnet_32_20"), create_model("resnet8"), "ofd")


@pytest.mark.parametrize(
    ("preset", "student", "teacher"),
    [("ofd", "resnet8", "wrn_16_2"), ("ofd", "wrn_16_1", "resnet8"), ("kdzoo", "resnet8", "wrn_16_1")],
)
def test_the_method_reads_the_maps_before_the_relu(preset, student, teacher):
    student, teacher = create_model(student).double(), create_model(teacher).double()
    for norm in teacher.norms_before_relu():
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    distillation = fastkd.Distillation(
        student, teacher, "ofd", options={"ofd": {"preset": preset}}, teacher_mode="train"
    ).double()
    images, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.arange(3)
    losses = distillation(images, labels)
    assert list(losses.terms) == ["ce", "ofd"]
    students, teachers = (network(images, features="preact")[0].stages for network in (student, teacher))
    connected = []
    for x, (convolution, norm) in zip(students, distillation.methods["ofd"].connectors, strict=True):
        assert convolution.weight.std().item() == pytest.approx((2 / norm.num_features) ** 0.5, rel=0.5)
        y = torch.einsum("nchw,kc->nkhw", x, convolution.weight[:, :, 0, 0])
        mean = y.mean((0, 2, 3), keepdim=True)
        connected.append((y - mean) / (((y - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt())
    if preset == "ofd":
        margins = [
            torch.tensor(
                [margin_by_hand(*pair) for pair in zip(n.weight.tolist(), n.bias.tolist(), strict=True)]
            ).double()
            for n in teacher.norms_before_relu()
        ]
        weights = [0.25e-3, 0.5e-3, 1e-3]
    else:
        margins = [
            torch.stack([t[:, i][t[:, i] < 0].mean().nan_to_num() for i in range(t.shape[1])])
            for t in teachers
        ]
        weights = [0.5 / 3 / t[0].numel() for t in teachers]
    torch.testing.assert_close(
        losses.terms["ofd"].double(), by_hand(connected, teachers, margins, weights), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        losses.terms["ce"].double(), F.cross_entropy(losses.student_logits, labels), rtol=1e-5, atol=1e-6
    )
    losses.total.backward()
    assert student.conv1.weight.grad.any() and all(
        c[0].weight.grad.any() for c in distillation.methods["ofd"].connectors
    )


def test_a_teacher_without_norms_needs_another_margin():
    teacher = create_model("resnet8")
    context = BuildContext.of(create_model("resnet8"), teacher)
    teacher.norms_before_relu = tuple
    with pytest.raises(
        ValueError,
        match=r"teacher is ResNet with 0 norms_before_relu\(\) for 3 stages: .* ofd.margin=data or .*=batch",
    ) as caught:
        create_method("ofd", context)
    assert "\n" not in str(caught.value)
    assert create_method("ofd", context, options={"ofd": {"margin": "batch"}}).function is None
    assert torch.equal(batch_margin(torch.ones(2, 3, 4, dtype=torch.float16)), torch.zeros(3))


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_margins_measured_on_the_training_images(kind):
    """Of the teacher in eval mode, whatever the mode it will have; the batches may differ in size."""
    torch.manual_seed(2)
    student, teacher = create_model("resnet8"), create_model("wrn_16_1")
    teacher.train()(torch.randn(8, 3, 32, 32))
    images = torch.randn(7, 3, 32, 32)
    batches = images.split(3)
    if kind == "loader":
        data = torch.utils.data.TensorDataset(images, torch.arange(7))
        batches = torch.utils.data.DataLoader(data, batch_size=3)
    buffers = [x.clone() for x in teacher.buffers()]
    options = {"ofd": {"margin": "data"}}
    distillation = fastkd.Distillation(
        student, teacher, "ofd", options=options, train_images=batches, teacher_mode="train"
    )
    assert teacher.training and all(map(torch.equal, buffers, teacher.buffers()))
    maps = teacher.eval()(images, features="preact")[0].stages
    for i, x in enumerate(maps):
        wanted = torch.stack([x[:, c][x[:, c] < 0].mean().nan_to_num() for c in range(x.shape[1])])
        found = getattr(distillation.methods["ofd"].function, f"margin_{i}")
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (found < 0).any()
    for given in (None, []):
        with pytest.raises(ValueError, match="train_images has no batch, wanted those of the training set"):
            fastkd.Distillation(student, teacher, "ofd", options=options, train_images=given)


def test_margins_of_a_teacher_without_norms_or_features():
    def network():
        layers = {"one": nn.Conv2d(3, 4, 3, padding=1), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1)}
        return nn.Sequential(OrderedDict(**layers, flat=nn.Flatten(), fc=nn.Linear(4, 5)))

    student, teacher, images = network(), network(), torch.randn(5, 3, 32, 32)
    points = {"student_points": ["one"], "teacher_points": ["one"]}
    options = {"ofd": {"margin": "data"}}
    made = fastkd.Distillation(
        student, teacher, "ofd", options=options, train_images=images.split(2), **points
    )
    x = teacher.one(images)
    wanted = torch.stack([x[:, c][x[:, c] < 0].mean() for c in range(4)])
    torch.testing.assert_close(made.methods["ofd"].function.margin_0, wanted.detach(), rtol=1e-5, atol=1e-6)
    assert made(images).total > 0


def test_a_run_measures_its_margins(small_main, tmp_path):
    """Also of a resumed run; the trial before it takes no look at the data."""
    flags = "--method ofd --dataset digits --teacher resnet8 --student resnet8 --epochs 1".split()
    flags += ["--device", "cpu", "--output", str(tmp_path), "--no-pictures", "--batch-size", "32"]
    assert small_main([*flags, "--option", "margin=data"]) == 0
    with open(tmp_path / "results.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    teacher = load_student(tmp_path / rows[0]["folder"])
    plan = Config(Settings("baseline", "digits", student="resnet8", device="cpu", output=tmp_path))
    images = torch.cat([x for x, _ in plan.batches("student")[0].test()])
    state = torch.load(tmp_path / rows[-1]["folder"] / "last.pt", weights_only=True)["method"]
    with torch.no_grad():
        maps = teacher(images, features="preact")[0].stages
    for i, x in enumerate(maps):
        wanted = torch.stack([x[:, c][x[:, c] < 0].mean().nan_to_num() for c in range(x.shape[1])])
        torch.testing.assert_close(state[f"ofd.function.margin_{i}"], wanted, rtol=1e-4, atol=1e-5)


def test_convolutions_under_autocast_and_one_graph():
    student, teacher = create_model("resnet8"), create_model("resnet8")
    distillation = fastkd.Distillation(
        student, teacher, "ofd", autocast=torch.autocast("cpu", torch.bfloat16), fold=False
    ).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    wanted = distillation(images, labels).terms["ofd"]
    assert wanted.dtype == torch.float32 and wanted.isfinite()
    torch._dynamo.reset()
    found = torch.compile(distillation, fullgraph=True, backend="eager")(images, labels).terms["ofd"]
    torch.testing.assert_close(found, wanted)


def test_a_run_has_the_teacher_in_train_mode(small_main, tmp_path, capsys):
    flags = "--method ofd --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert small_main([*flags, "--device", "cpu", "--output", str(tmp_path), "--no-pictures"]) == 0
    capsys.readouterr()
    with open(tmp_path / "results.csv", newline="") as file:
        row = [*csv.DictReader(file)][-1]
    folder = tmp_path / row["folder"]
    assert row["method"] == "ofd" and '"teacher_mode": "train"' in (folder / "config.json").read_text()
    state = torch.load(folder / "last.pt", weights_only=True)
    assert any("margin_2" in name for name in str(state).split("'"))
