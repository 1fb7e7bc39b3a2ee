"""OFD as a method: what it reads of both networks, its margins, and its runs."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from ofd_cases import by_hand, margin_by_hand
from record_files import rows_of
from torch import nn

import fastkd
from fastkd.methods import BuildContext, create_method
from fastkd.methods.ofd import batch_margin
from fastkd.models import create_model, load_student
from fastkd.training.config import Config, Settings


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
    rows = rows_of(tmp_path)
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
    row = rows_of(tmp_path)[-1]
    folder = tmp_path / row["folder"]
    assert row["method"] == "ofd" and '"teacher_mode": "train"' in (folder / "config.json").read_text()
    state = torch.load(folder / "last.pt", weights_only=True)
    assert any("margin_2" in name for name in str(state).split("'"))
