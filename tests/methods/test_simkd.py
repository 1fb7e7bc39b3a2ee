"""SimKD: its worked figures, an independent form, and a student that is tested and saved with what it was
given.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from record_files import rows_of

import fastkd
from fastkd.methods import BuildContext, create_method
from fastkd.methods.simkd import Projector, to_smaller
from fastkd.models import Features, create_model


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def pooled(x, size):
    """Averages of equal parts, by hand: the sizes here divide each other."""
    n, c, h, w = x.shape
    size = [min(a, b) for a, b in zip((h, w), size, strict=True)]
    return x.view(n, c, size[0], h // size[0], size[1], w // size[1]).mean((3, 5))


def by_hand(fs, ft, convolutions):
    """(loss, projected map): batch norms from their formula, weight 1 and bias 0, in training."""
    x = pooled(fs, ft.shape[2:])
    for weight in convolutions:
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        mean = x.mean((0, 2, 3), keepdim=True)
        x = ((x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).clamp_min(0)
    return ((x - pooled(ft, x.shape[2:])) ** 2).sum() / x.numel(), x


def projected(fs, ft, convolutions, factor):
    """(loss, projected map) as the method has them."""
    projector = Projector(fs.shape[1], ft.shape[1], ft.shape[2:], factor).double()
    found = [module for module in projector.layers if isinstance(module, torch.nn.Conv2d)]
    for module, weight in zip(found, convolutions, strict=True):
        assert module.weight.shape == weight.shape
        module.weight = torch.nn.Parameter(weight)
    x = projector(fs)
    return F.mse_loss(x, to_smaller(ft, x.shape[2:])), x, [module.weight for module in found]


def test_the_worked_figures():
    fs, ft = worked((2, 2, 4, 4), 3), worked((2, 2, 2, 2), 5).relu()
    convolutions = [worked((2, 2, 1, 1), 4), worked((2, 2, 3, 3), 6), worked((2, 2, 1, 1), 7)]
    loss, x, _ = projected(fs, ft, convolutions, factor=1)
    logits = F.linear(x.mean((2, 3)), worked((2, 2), 8), worked((2,), 3))
    assert abs(loss.item() - 0.3565837156) <= 5e-11 and abs(logits[1, 0].item() - -0.5142678253) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    n, widths, factor = (
        chosen.choice((2, 3, 5)),
        [chosen.choice((1, 3, 6)), chosen.choice((2, 3, 8))],
        chosen.choice((1, 2)),
    )
    sizes = [chosen.choice(((4, 4), (2, 2), (4, 2), (8, 8))) for _ in range(2)]
    fs, ft = (
        torch.randn(n, width, *size, dtype=torch.float64) for width, size in zip(widths, sizes, strict=True)
    )
    middle = widths[1] // factor
    shapes = [(middle, widths[0], 1, 1), (middle, middle, 3, 3), (widths[1], middle, 1, 1)]
    convolutions = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fs.requires_grad_()
    wanted, x = by_hand(fs, ft.relu(), convolutions)
    exact = torch.autograd.grad(wanted, [fs, *convolutions])
    loss, found, weights = projected(fs, ft.relu(), [weight.detach() for weight in convolutions], factor)
    torch.testing.assert_close([loss, found], [wanted, x], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, [fs, *weights]), exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8", "resnet8x4"),
        ("wrn_16_1", "wrn_16_2"),
        ("resnet8", "wrn_16_2"),
        ("resnet_32_20", "resnet8"),
    ],
)
def test_the_student_predicts_by_projector_and_the_teachers_classifier(student, teacher):
    torch.manual_seed(4)
    networks = create_model(student, 7), create_model(teacher, 7)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    distillation = fastkd.Distillation(*networks, "simkd", fold=False)
    losses = distillation(images, labels)
    assert list(losses.terms) == ["simkd"]
    losses.total.backward()
    assert (
        networks[0].conv1.weight.grad.any()
        and networks[0].neck.layers[0].weight.grad.any()
        and networks[0].fc.weight.grad is None
    )
    assert networks[0].fc is not networks[1].fc and torch.equal(networks[0].fc.weight, networks[1].fc.weight)
    distillation.eval()
    features, logits = distillation.student(images, features=True)
    torch.testing.assert_close(logits, networks[1].fc(features.final.mean((2, 3))))
    wanted = networks[1](images, features=True)[0].final
    torch.testing.assert_close(
        distillation(images).total,
        ((features.final - to_smaller(wanted, features.final.shape[2:])) ** 2).mean(),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_difference_is_taken_in_float32(dtype):
    context = BuildContext.of(create_model("resnet8"), create_model("resnet8"))
    method = create_method("simkd", context, options={"simkd": {"beta": 0.5}})
    assert (
        not method.wrap_student(context.student).fc.weight.requires_grad
        and context.teacher.fc.weight.requires_grad
    )
    maps = [100 * torch.randn(2, 64, 8, 8).to(dtype) for _ in range(2)]
    outputs = [fastkd.methods.Output(None, Features((), (), None, (), final=x)) for x in maps]
    loss = method.loss(None, *outputs, None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(maps[0].float(), maps[1].float()))


def test_what_does_not_fit_is_one_line():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with pytest.raises(
        ValueError,
        match=r"student Sequential has no map \(N, C, H, W\) whose mean is what its classifier '1' takes",
    ) as caught:
        fastkd.Distillation(plain, create_model("resnet8"), "simkd")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="option simkd: factor is 0, wanted at least 1"):
        fastkd.methods.define("simkd", options={"simkd": {"factor": 0}})
    with pytest.raises(ValueError, match="simkd.factor is 65, wanted at most the 64 channels"):
        fastkd.Distillation(
            create_model("resnet8"), create_model("resnet8"), "simkd", options={"simkd": {"factor": 65}}
        )
    assert fastkd.methods.define("simkd+kd").names == ("simkd", "kd")


def test_a_run_tests_saves_and_draws_the_changed_student(small_main, tmp_path, capsys):
    flags = "--method simkd --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert (
        small_main(
            [*flags, "--device", "cpu", "--output", str(tmp_path), "--option", "factor=4", "--no-pictures"]
        )
        == 0
    )
    out = capsys.readouterr().out
    count = 78_042 + 64 * 16 + 16 * 16 * 9 + 16 * 64 + 2 * (16 + 16 + 64)
    assert f"student  resnet8, 78,042 parameters; {count:,} as simkd trains, tests and saves it" in out
    row = rows_of(tmp_path)[-1]
    best = torch.load(tmp_path / row["folder"] / "best.pt", weights_only=True)
    (teacher,) = tmp_path.glob("teachers/*.pt")
    taught = torch.load(teacher, weights_only=True)["model"]
    assert torch.equal(best["model"]["fc.weight"], taught["fc.weight"]) and best["model"][
        "neck.layers.3.weight"
    ].shape == (16, 16, 3, 3)
    assert json.loads((tmp_path / row["folder"] / "config.json").read_text())["identity"]["options"] == {
        "simkd.factor": "4"
    }
    pytest.importorskip("matplotlib")
    from fastkd.report.maps import redraw

    assert redraw(tmp_path / row["folder"], None)
