"""SRRL on the map and on the vector: its worked figures, an independent form, and a classifier that is not
trained.
"""

from __future__ import annotations

import random

import pytest
import torch
from record_files import rows_of

import fastkd
from fastkd.methods import BuildContext, Output, create_method
from fastkd.models import Features, create_model


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def normed(x):
    """A batch norm in training, weight 1 and bias 0, by its formula."""
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


class Last(torch.nn.Module):
    """A network that is its classifier alone."""

    def __init__(self, weight, bias):
        super().__init__()
        self.fc = torch.nn.Linear(weight.shape[1], weight.shape[0])
        self.fc.weight, self.fc.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)


def shaped(final):
    return Features((), (), final[:1], (), final=final)


def output(x):
    """What a network shows whose last map, or pooled vector, is ``x``."""
    return Output(
        None, Features((), (), x if x.dim() == 2 else x.mean((2, 3)), (), final=x if x.dim() == 4 else None)
    )


def method(fs, ft, convolution, weight, bias, **options):
    network = Last(weight, bias)
    context = BuildContext(network, network, shaped(fs.shape[1:]), shaped(ft.shape[1:]), len(weight))
    made = create_method(
        "srrl", context, options={"srrl": {"on": "map" if fs.dim() == 4 else "vector", **options}}
    ).double()
    assert made.connector[0].weight.shape == (*convolution.shape, 1, 1)
    made.connector[0].weight = torch.nn.Parameter(convolution[:, :, None, None])
    return made


def loss_of(made, fs, ft):
    student, teacher = output(fs), output(ft)
    return made.loss(None, student, teacher, made.connect(None, student, teacher))


def by_hand(fs, ft, convolution, weight, bias, beta=1.0, regression=1.0):
    x = torch.einsum("nc...,kc->nk...", fs, convolution)
    x = normed(x if x.dim() == 4 else x[:, :, None, None]).clamp_min(0).mean((2, 3))
    t = ft if ft.dim() == 2 else ft.mean((2, 3))
    answers = [v @ weight.T + bias for v in (x, t)]
    return beta * (
        ((x - t) ** 2).sum() / x.numel()
        + regression * ((answers[0] - answers[1]) ** 2).sum() / answers[0].numel()
    )


@pytest.mark.parametrize(
    ("fs", "ft", "wanted"),
    [((2, 2, 2, 2), (2, 3, 2, 2), 0.1116715364), ((2, 2), (2, 3), 0.3093466180)],
    ids=["map", "vector"],
)
def test_the_worked_figures(fs, ft, wanted):
    fs, ft = worked(fs, 3), worked(ft, 5).relu()
    rest = worked((3, 2), 7), worked((2, 3), 4), worked((2,), 9)
    assert abs(loss_of(method(fs, ft, *rest), fs, ft).item() - wanted) <= 5e-11
    assert abs(by_hand(fs, ft, *rest).item() - wanted) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    n, widths, classes = (
        chosen.choice((2, 3, 7)),
        [chosen.choice((1, 3, 5)) for _ in range(2)],
        chosen.choice((2, 5)),
    )
    sizes = (
        [[chosen.choice((1, 2, 3, 5)) for _ in range(2)] for _ in range(2)]
        if chosen.random() < 0.6
        else [[], []]
    )
    fs, ft = (
        torch.randn(n, width, *size, dtype=torch.float64) for width, size in zip(widths, sizes, strict=True)
    )
    fs.requires_grad_()
    convolution, weight, bias = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((widths[1], widths[0]), (classes, widths[1]), classes)
    )
    made = method(fs, ft, convolution, weight, bias, beta=0.5, regression=3.0)
    loss, trained = loss_of(made, fs, ft), made.connector[0].weight
    wanted = by_hand(fs, ft, convolution.requires_grad_(), weight, bias, 0.5, 3.0)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-10)
    found, exact = torch.autograd.grad(loss, (fs, trained)), torch.autograd.grad(wanted, (fs, convolution))
    torch.testing.assert_close([found[0], found[1][:, :, 0, 0]], [*exact], rtol=1e-6, atol=1e-8)


def test_the_classifier_is_a_copy_that_nothing_trains():
    student, teacher = create_model("resnet8"), create_model("wrn_16_1")
    distillation = fastkd.Distillation(student, teacher, "srrl", fold=False)
    made = distillation.methods["srrl"]
    assert torch.equal(made.weight, teacher.fc.weight) and made.weight is not teacher.fc.weight
    assert {*made.state_dict()} >= {"weight", "bias"} and len([*made.parameters()]) == 3
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    losses = distillation(images, labels)
    assert list(losses.terms) == ["ce", "srrl"]
    losses.total.backward()
    assert (
        student.conv1.weight.grad.any()
        and made.connector[0].weight.grad.any()
        and teacher.fc.weight.grad is None
    )
    # the teacher's side of a wide ResNet is pooled after its last ReLU
    final, wanted = student(images, features=True)[0].final, teacher.eval()(images, features=True)[0].final
    rest = made.connector[0].weight[:, :, 0, 0], teacher.fc.weight, teacher.fc.bias
    torch.testing.assert_close(losses.terms["srrl"], by_hand(final, wanted, *rest), rtol=1e-4, atol=1e-6)


def test_the_presets_are_the_two_forms():
    assert fastkd.methods.define("srrl").names == ("ce", "srrl")
    found = fastkd.methods.define("srrl", words=["srrl.preset=simkd"])
    assert (
        found.names == ("ce", "srrl", "kd")
        and found.terms[0].options.on == "vector"
        and found.terms[1].options.weight == 1
    )


@pytest.mark.parametrize("on", ["map", "vector"])
def test_under_autocast_and_as_one_graph(on):
    networks = create_model("resnet8"), create_model("resnet8")
    autocast = torch.autocast("cpu", torch.bfloat16)
    distillation = fastkd.Distillation(
        *networks, "srrl", options={"srrl": {"on": on}}, autocast=autocast, fold=False
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = distillation(images).terms["srrl"]
    assert wanted.dtype == torch.float32 and wanted.isfinite()
    torch._dynamo.reset()
    found = torch.compile(distillation, fullgraph=True, backend="eager")(images).terms["srrl"]
    torch.testing.assert_close(found, wanted)


def test_what_does_not_fit_is_one_line():
    teacher = Last(torch.ones(2, 3), torch.ones(2))
    context = BuildContext(teacher, teacher, shaped(torch.Size([4, 2, 2])), shaped(torch.Size([5, 2, 2])), 2)
    with pytest.raises(
        ValueError, match="teacher is Last without a Linear for its 5 numbers: srrl wanted a classifier"
    ) as caught:
        create_method("srrl", context)
    assert "\n" not in str(caught.value)
    context = BuildContext(
        teacher, teacher, Features((), (), torch.Size([4]), ()), shaped(torch.Size([3, 2, 2])), 2
    )
    with pytest.raises(ValueError, match="student's last map is None: srrl wanted .* srrl.on=vector"):
        create_method("srrl", context)
    assert create_method("srrl", context, options={"srrl": {"preset": "simkd"}}).on == "vector"


def test_a_run_saves_the_classifier(small_main, tmp_path, capsys):
    flags = "--method srrl --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert small_main([*flags, "--device", "cpu", "--output", str(tmp_path), "--no-pictures"]) == 0
    capsys.readouterr()
    row = rows_of(tmp_path)[-1]
    state = torch.load(tmp_path / row["folder"] / "last.pt", weights_only=True)
    (teacher,) = tmp_path.glob("teachers/*.pt")
    taught = torch.load(teacher, weights_only=True)["model"]
    kept = [x for x in tensors(state) if x.shape == (10, 64) and torch.equal(x, taught["fc.weight"])]
    assert row["method"] == "srrl" and len(kept) == 1


def tensors(tree):
    leaves, _ = torch.utils._pytree.tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
