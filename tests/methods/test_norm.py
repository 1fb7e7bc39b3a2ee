"""NORM: worked figures, an independent form, its weights and schedule, and a student that is tested and saved
with its pair.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from record_files import rows_of

import fastkd
from fastkd import methods, native
from fastkd.methods import BuildContext, create_method
from fastkd.methods.norm import Pair
from fastkd.models import create_model
from fastkd.models.features import Record
from fastkd.ops.norm import norm_loss
from fastkd.training import Trainer


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def by_hand(u, target, copies):
    """Copy by copy and cell by cell of the larger map."""
    width, size = target.shape[1], u.shape[2:]
    steps = [big // small for big, small in zip(target.shape[2:], size, strict=True)]  # whole in these tests
    rows = [
        torch.stack(
            [
                target[:, :, i * steps[0] : (i + 1) * steps[0], j * steps[1] : (j + 1) * steps[1]].amax(
                    (2, 3)
                )
                for j in range(size[1])
            ],
            2,
        )
        for i in range(size[0])
    ]
    small = torch.stack(rows, 2)
    squares = [((u[:, k * width : (k + 1) * width] - small) ** 2).sum() for k in range(copies)]
    return copies * sum(squares) / u.numel()


def method_of(student="resnet8", teacher="resnet8", **options):
    context = BuildContext.of(create_model(student), create_model(teacher))
    return create_method("norm", context, options={"norm": options}).double()


U, TARGET = worked((2, 4, 2, 2), 3), worked((2, 2, 2, 2), 5)


def test_the_worked_figures():
    assert abs(norm_loss(U, TARGET, 2).item() - 0.3106250000) <= 5e-11
    assert abs(norm_loss(U, worked((2, 2, 4, 4), 5), 2).item() - 0.5581250000) <= 5e-11
    pair = Pair(2, 4).double()
    for conv, weight in ((pair.conv1, worked((4, 2), 5)), (pair.conv2, worked((2, 4), 7))):
        conv.weight.data.copy_(weight[..., None, None])
    assert abs(pair(worked((2, 2, 2, 2), 3)).square().mean().item() - 0.8985533005) <= 5e-11
    method = method_of()
    zs, zt = method.logits(worked((2, 5), 3)), method.logits(worked((2, 5), 7))
    total = (
        0.125 * F.cross_entropy(zs, torch.tensor([1, 4]))
        + 0.9 * fastkd.kd_loss(zs, zt)
        + method.weight_at(15, 240) * norm_loss(U, TARGET, 2)
    )
    assert abs(total.item() - 3.1458282517) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    n, width, copies = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 5)), chosen.choice((1, 2, 3))
    size, steps = (
        [chosen.choice((1, 3, 4)) for _ in range(2)],
        [chosen.choice((1, 1, 2, 3)) for _ in range(2)],
    )
    u = torch.randn(n, copies * width, *size, dtype=torch.float64)
    if chosen.random() < 0.5:
        u = u.to(memory_format=torch.channels_last)
    target = torch.randn(n, width, *(a * b for a, b in zip(size, steps, strict=True)), dtype=torch.float64)
    found, wanted = (
        [
            out := loss(u.requires_grad_(), target.requires_grad_(), copies),
            *torch.autograd.grad(out, (u, target)),
        ]
        for loss in (norm_loss, by_hand)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_the_pair_by_hand():
    pair, x = Pair(3, 6).double(), torch.randn(4, 3, 5, 2, dtype=torch.float64, requires_grad=True)
    record = Record(True, None)

    def norm(y):
        mean = y.mean((0, 2, 3), keepdim=True)
        return (y - mean) / (((y - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    u = norm(torch.einsum("oc,nchw->nohw", pair.conv1.weight[:, :, 0, 0], x))
    wanted = norm(torch.einsum("oc,nchw->nohw", pair.conv2.weight[:, :, 0, 0], u)) + x
    torch.testing.assert_close([pair(x, record), record.neck], [wanted, u])
    upstream = torch.randn_like(x)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(y, [x, pair.conv1.weight, pair.conv2.weight], upstream)
            for y in (pair(x), wanted)
        )
    )
    assert torch.autograd.gradcheck(
        lambda u, t: norm_loss(u, t, 2), (U.requires_grad_(), TARGET.requires_grad_())
    )
    assert pair.conv1.bias is None and Pair(64, 512).conv1.weight.std().item() == pytest.approx(
        (2 / 512) ** 0.5, rel=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_difference_is_taken_in_float32(dtype):
    u, target = (300 * torch.randn(2, 4, 3, 3)).to(dtype), (300 * torch.randn(2, 2, 3, 3)).to(dtype)
    loss = norm_loss(u, target, 2)
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, norm_loss(u.double(), target.double(), 2).float())


def test_the_targets_repeats_are_never_made():
    """What the backward pass keeps is u and its gradient, or by the reference u and the target itself."""
    u, target = torch.randn(16, 512, 16, 16, requires_grad=True), torch.randn(16, 64, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.untyped_storage().nbytes()) or x, lambda x: x
    ):
        sizes = []
        norm_loss(u, target, 8)
    assert sorted(sizes) == [4 * (u if native.CPU.available else target).numel(), 4 * u.numel()]


@pytest.mark.parametrize("epochs", [240, 241])
def test_the_schedule_is_a_fraction_of_the_run(epochs):
    factors = [method_of_any.weight_at(epoch, epochs) for epoch in range(epochs)]
    wanted = [0.1] * 10 + [0.5] * 10 + [1.0] * 160 + [0.5] * 30 + [0.1] * (epochs - 210)
    assert factors == wanted
    assert [method_of_any.weight_at(epoch, 2) for epoch in (0, 1)] == [0.1, 1.0]
    assert [method_of_any.weight_at(epoch, 24) for epoch in range(24)] == wanted[5:240:10]


method_of_any = method_of()


def test_weights_of_cross_entropy_and_kd():
    for preset in ("hankyul2", "repdistiller", None):
        assert (
            methods.define("norm", preset=preset).names == ("ce", "norm")
            and methods.define("norm", preset=preset).ce == 0.125
        )
        found = methods.define("kd+norm", preset=preset, options={"norm": {"gamma": 0.25}})
        assert found.names == ("ce", "norm", "kd") and (found.ce, found.terms[1].options.weight) == (
            0.25,
            0.75,
        )
        assert found.changes == {"norm.gamma": 0.25}
    assert methods.define("norm+kd", options={"kd": {"weight": 0.9}}).terms[1].options.weight == 0.9
    with pytest.raises(ValueError, match="ce.weight is left open"):
        methods.define("norm+at")


@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "resnet8x4"), ("wrn_16_1", "wrn_16_2"), ("resnet_32_20", "resnet8")]
)
def test_the_method_in_a_distillation(student, teacher):
    torch.manual_seed(4)
    networks = create_model(student, 7), create_model(teacher, 7)
    names, images, labels = set(networks[0].state_dict()), torch.randn(4, 3, 32, 32), torch.arange(4)
    distillation = fastkd.Distillation(*networks, "norm+kd", options={"norm": {"copies": 2}}, fold=False)
    distillation.set_epoch(1, 24)  # 0.5
    losses = distillation(images, labels)
    assert {name.split(".")[0] for name in set(networks[0].state_dict()) - names} == {"neck"} and names < set(
        networks[0].state_dict()
    )
    features, logits = distillation.student(images, features=True)
    target, taught = networks[1](images, features=True)
    if target.stages[2].shape[2:] == features.neck.shape[2:]:
        torch.testing.assert_close(
            losses.terms["norm"], 0.5 * by_hand(features.neck, target.stages[2], 2), rtol=1e-4, atol=1e-5
        )
    z, t = (
        2.5 * (y - y.mean(1, keepdim=True)) / y.std(1, correction=0, keepdim=True) for y in (logits, taught)
    )
    torch.testing.assert_close(losses.terms["ce"], 0.125 * F.cross_entropy(z, labels), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.terms["kd"], 0.875 * fastkd.kd_loss(z, t), rtol=1e-3, atol=1e-5)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in networks[0].neck.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distillation(images, labels)
    assert rounded.terms["norm"].dtype == torch.float32
    torch.testing.assert_close(rounded.terms["norm"], losses.terms["norm"], rtol=0.1, atol=0.05)
    distillation.eval()
    # no layer norm
    torch.testing.assert_close(distillation(images, labels).student_logits, networks[0](images))


def test_it_is_one_graph():
    torch._dynamo.reset()
    images, labels, found = torch.randn(2, 3, 32, 32), torch.arange(2), []
    for compiled in (False, True):
        torch.manual_seed(4)
        distillation = fastkd.Distillation(
            create_model("resnet8"), create_model("resnet8"), "norm", options={"norm": {"copies": 1}}
        )
        losses = (torch.compile(distillation, fullgraph=True, backend="eager") if compiled else distillation)(
            images, labels
        )
        losses.total.backward()
        found.append([losses.terms, [p.grad for p in distillation.parameters()]])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_one_line():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    with pytest.raises(
        ValueError,
        match=r"student Sequential has no map \(N, C, H, W\) whose mean is what its classifier '1' takes",
    ) as caught:
        fastkd.Distillation(plain, create_model("resnet8"), "norm")
    assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError,
        match=(
            r"student's last map is \(64, 8, 8\), the teacher's \(64, 7, 7\): .* wanted a student's no larger"
        ),
    ):
        fastkd.Distillation(create_model("resnet8"), create_model("resnet_32_20"), "norm")
    for name, value, wanted in (
        ("gamma", 1.0, "less than 1"),
        ("gamma", 0.0, "more than 0"),
        ("copies", 0, "at least 1"),
        ("scale", 0.0, "more"),
    ):
        with pytest.raises(ValueError, match=f"option norm: {name} is {value}, wanted .*{wanted}"):
            methods.define("norm", options={"norm": {name: value}})


def test_a_run_tests_and_saves_the_pair_and_is_taken_up(small_main, monkeypatch, tmp_path, capsys):
    flags = "--method norm+kd --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    flags += "--device cpu --no-pictures --option copies=2".split()
    assert small_main([*flags, "--output", str(tmp_path / "whole")]) == 0
    count = 78_042 + 2 * 64 * 128 + 2 * (128 + 64)
    assert (
        f"student  resnet8, 78,042 parameters; {count:,} as norm+kd trains, tests and saves it"
        in capsys.readouterr().out
    )
    whole = Trainer.train_epoch

    def stopped(self, number, progress):
        if number == 2 and "norm" in self.method:
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
    torch.testing.assert_close(
        *[{key: state[key] for key in ("model", "best")} for state in states], rtol=0, atol=0
    )
    assert torch.load(folder / "best.pt", weights_only=True)["model"]["neck.bn1.running_mean"].any()
