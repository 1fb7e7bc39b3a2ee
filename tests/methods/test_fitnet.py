"""FitNet: its regressor in every case of sizes, worked figures, an independent form, one phase and two."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from record_files import rows_of

import fastkd
from fastkd.methods import BuildContext, Output, create_method
from fastkd.methods.connectors import ConvReg
from fastkd.models import Features, create_model
from fastkd.training import Settings, UserError
from fastkd.training.config import Config
from fastkd.training.flags import without_idle


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def normed(x):
    """A batch norm in training, weight 1 and bias 0, by its formula."""
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def convolved(x, weight, bias, size):
    """The convolution of each case of sizes, position by position as products of unfolded windows."""
    n, _, *have = x.shape
    # transposed: each number is spread over a window
    if all(2 * a == b for a, b in zip(have, size, strict=True)):
        columns = torch.einsum("ncp,cq->nqp", x.flatten(2), weight.flatten(1))
        return F.fold(columns, size, 4, padding=1, stride=2) + bias.view(-1, 1, 1)
    fits = all(a >= b for a, b in zip(have, size, strict=True)) and weight.shape[2:] != (3, 3)
    half = all(a == 2 * b for a, b in zip(have, size, strict=True))
    windows = F.unfold(x, weight.shape[2:], padding=0 if fits else 1, stride=2 if half else 1)
    out = [*size] if fits or half else have
    return (torch.einsum("ncp,kc->nkp", windows, weight.flatten(1)) + bias.view(-1, 1)).view(n, -1, *out)


def by_hand(fs, ft, weight, bias, relu=True):
    x = normed(convolved(fs, weight, bias, ft.shape[2:]))
    x = x.clamp_min(0) if relu else x
    return 100 * ((x - F.adaptive_avg_pool2d(ft, x.shape[2:])) ** 2).sum() / x.numel()


def output(x):
    return Output(None, Features((), (x,), None, ()))


def loss_and_regressor(fs, ft, weight, bias, **options):
    shapes = [Features((), (x.shape[1:],), None, ()) for x in (fs, ft)]
    network = torch.nn.Linear(1, 1)
    made = create_method(
        "fitnet", BuildContext(network, network, *shapes, 2), options={"fitnet": {"hint": 1, **options}}
    ).double()
    convolution = made.regressor.convolution
    assert convolution.weight.shape == weight.shape and convolution.bias.shape == bias.shape
    convolution.weight, convolution.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return made.loss(None, output(fs), output(ft), made.connect(None, output(fs), output(ft))), convolution


@pytest.mark.parametrize(
    ("fs", "ft", "weight", "relu", "wanted"),
    [
        ((2, 3, 2, 2), (2, 2, 2, 2), (2, 3, 1, 1), True, 1.0060370215),
        ((2, 3, 2, 2), (2, 2, 2, 2), (2, 3, 1, 1), False, 1.4806689850),
        ((2, 3, 4, 4), (2, 2, 2, 2), (2, 3, 3, 3), True, 0.7047149728),
        ((2, 3, 2, 2), (2, 2, 4, 4), (3, 2, 4, 4), True, 0.5338969363),
    ],
)
def test_the_worked_figures(fs, ft, weight, relu, wanted):
    inputs = worked(fs, 3), worked(ft, 5), worked(weight, 7), worked((2,), 4)
    assert abs(loss_and_regressor(*inputs, relu=relu, beta=1.0)[0].item() - wanted) <= 5e-11
    assert abs(by_hand(*inputs, relu).item() / 100 - wanted) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    n, widths = chosen.choice((2, 3, 5)), [chosen.choice((1, 2, 5)) for _ in range(2)]
    target = [chosen.choice((2, 3, 5)) for _ in range(2)]
    case = seed % 4
    size = [
        [2 * t for t in target],
        list(target),
        [t + chosen.choice((0, 1, 3)) for t in target],
        [t - 1 for t in target],
    ][case]
    if case == 1:
        target = [2 * t for t in target]
    double = case == 2 and all(s == 2 * t for s, t in zip(size, target, strict=True))
    half = all(2 * s == t for s, t in zip(size, target, strict=True))
    kernel = [1 + s - t for s, t in zip(size, target, strict=True)] if case == 2 and not double else [3, 3]
    shape = (widths[0], widths[1], 4, 4) if half else (widths[1], widths[0], *kernel)
    fs, ft, weight, bias = (
        torch.randn(s, dtype=torch.float64)
        for s in ((n, widths[0], *size), (n, widths[1], *target), shape, (widths[1],))
    )
    fs.requires_grad_()
    loss, convolution = loss_and_regressor(fs, ft, weight, bias)
    leaf = weight.clone().requires_grad_()
    wanted = by_hand(fs, ft, leaf, bias)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=1e-9)
    found, exact = (
        torch.autograd.grad(loss, (fs, convolution.weight)),
        torch.autograd.grad(wanted, (fs, leaf)),
    )
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_the_method_reads_the_second_stage_or_another():
    student, teacher = create_model("resnet8"), create_model("wrn_16_1")
    images, labels = torch.randn(3, 3, 32, 32), torch.arange(3)
    for hint, stem in ((2, False), (0, True)):
        distillation = fastkd.Distillation(
            student, teacher, "fitnet", options={"fitnet": {"hint": hint}}, fold=False
        )
        losses = distillation(images, labels)
        losses.total.backward()
        maps = [(network(images, features=True)[0]) for network in (student, teacher.eval())]
        fs, ft = ((x.stem if stem else x.stages[hint - 1]) for x in maps)
        convolution = distillation.methods["fitnet"].regressor.convolution
        wanted = by_hand(fs, ft, convolution.weight, convolution.bias)
        torch.testing.assert_close(losses.terms["fitnet"], wanted, rtol=1e-4, atol=1e-5)
        assert (
            list(losses.terms) == ["ce", "fitnet"]
            and convolution.weight.grad.any()
            and student.conv1.weight.grad.any()
        )


def test_the_presets():
    define = fastkd.methods.define
    assert (
        define("fitnet", preset="repdistiller").names == ("ce", "fitnet") and not define("fitnet").initializes
    )
    found = define("fitnet", words=["fitnet.preset=simkd"])
    assert (
        found.names == ("ce", "fitnet", "kd")
        and found.terms[0].options.hint == 1
        and found.terms[1].options.weight == 1
    )
    equal, wide = create_model("resnet8"), create_model("resnet8x4")
    options = {"fitnet": {"preset": "kdzoo"}}
    distillation = fastkd.Distillation(
        equal, create_model("resnet8"), "fitnet", options=options, fold=False
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = [network.eval()(images, features=True)[0].stages[2] for network in (equal, distillation.teacher)]
    torch.testing.assert_close(distillation(images).total, 0.1 * ((maps[0] - maps[1]) ** 2).mean())
    with pytest.raises(
        ValueError,
        match="fitnet.regressor is none, student's map is .64, 8, 8., teacher's is .256, 8, 8.: wanted equal",
    ):
        fastkd.Distillation(equal, wide, "fitnet", options=options)


def test_lenscloths_regressor_is_a_convolution_alone():
    torch.manual_seed(3)
    student, wide = create_model("resnet8"), create_model("resnet8x4")
    options = {"fitnet": {"preset": "lenscloth", "phases": 1}}
    distillation = fastkd.Distillation(student, wide, "fitnet", options=options, fold=False).eval()
    weight = distillation.methods["fitnet"].regressor.weight
    assert [*distillation.methods["fitnet"].state_dict()] == ["regressor.weight"]
    assert weight.shape == (128, 32, 1, 1) and 0.0045 < weight.abs().max() <= 0.005
    assert abs(weight.mean()) < 2e-4 and abs(weight.std().item() - 0.005 / 3**0.5) < 2e-4  # uniform
    images = torch.randn(2, 3, 32, 32)
    s, t = (network.eval()(images, features=True)[0].stages[1] for network in (student, wide))
    wanted = (torch.einsum("nchw,kc->nkhw", s, weight[:, :, 0, 0]) - t).square().mean()
    torch.testing.assert_close(distillation(images).total, wanted)
    found = fastkd.methods.define("fitnet", preset="lenscloth")
    assert found.terms[0].options.phases == 2 and found.terms[0].options.beta == 1
    with pytest.raises(
        ValueError,
        match="regressor is pointwise, student.s map is .32, 14, 14., teacher.s is .128, 16, 16.: wanted map",
    ):
        fastkd.Distillation(create_model("resnet_32_20"), wide, "fitnet", options=options)


def test_under_autocast_and_as_one_graph():
    networks = create_model("resnet8"), create_model("resnet8")
    distillation = fastkd.Distillation(
        *networks, "fitnet", autocast=torch.autocast("cpu", torch.bfloat16), fold=False
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = distillation(images).terms["fitnet"]
    assert wanted.dtype == torch.float32 and wanted.isfinite()
    torch._dynamo.reset()
    found = torch.compile(distillation, fullgraph=True, backend="eager")(images).terms["fitnet"]
    torch.testing.assert_close(found, wanted)


def test_what_does_not_fit_is_one_line():
    networks = create_model("resnet8"), create_model("resnet8")
    for hint in (4, -1):
        with pytest.raises(ValueError, match=f"fitnet.hint is {hint}, wanted 0 to 3"):
            fastkd.Distillation(*networks, "fitnet", options={"fitnet": {"hint": hint}})
    with pytest.raises(ValueError, match="option fitnet: phases is 3, wanted 1 or 2"):
        fastkd.methods.define("fitnet", words=["phases=3"])
    flat = Features((), (torch.Size([4, 9]),), None, ())
    network = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match=r"student's map is \(4, 9\), teacher's is \(4, 9\): fitnet wanted maps \(C, H, W\)"
    ):
        create_method(
            "fitnet", BuildContext(network, network, flat, flat, 2), options={"fitnet": {"hint": 1}}
        )
    assert ConvReg((2, 4, 4), (3, 4, 4)).convolution.kernel_size == (1, 1)


def test_two_phases_are_asked_for():
    """Recipes have a first phase for FSP; FitNet's is the paper's, and no toolkit's."""
    with pytest.raises(
        UserError, match="--init-epochs does nothing here: --method fitnet has no first phase"
    ):
        without_idle([Settings("fitnet", "digits", overrides={"init_epochs": 2})])
    read = {"init_epochs": 2, "init_lr": 0.1}
    without_idle([Settings("fitnet", "digits", options=["phases=2"], overrides=read)])
    pytest.importorskip("sklearn")
    with pytest.raises(UserError, match="--init-epochs is 0, but fitnet.phases is 2: wanted at least 1"):
        Config(Settings("fitnet", "digits", options=["phases=2"]))
    two = fastkd.methods.define("fitnet+at", words=["phases=2", "ce.weight=1"])
    assert two.initialization().names == ("fitnet",) and two.after_initialization().names == ("ce", "at")


@pytest.mark.parametrize(
    "extra", [(), ("--option", "phases=2", "--init-epochs", "1")], ids=["joint", "two phases"]
)
def test_a_run(small_main, tmp_path, capsys, extra):
    flags = "--method fitnet --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert small_main([*flags, "--device", "cpu", "--output", str(tmp_path), "--no-pictures", *extra]) == 0
    capsys.readouterr()
    row = rows_of(tmp_path)[-1]
    state = torch.load(tmp_path / row["folder"] / "last.pt", weights_only=True)
    assert row["method"] == "fitnet" and ("regressor.convolution.weight" in str(state)) == (not extra)
