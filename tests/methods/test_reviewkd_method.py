"""ReviewKD as a method: its weight by pair, its maps, its schedule, a run of it."""

from __future__ import annotations

import pytest
import torch
from record_files import rows_in, rows_of
from review_cases import reviewed

import fastkd
from fastkd.methods.reviewkd import ABF, ReviewKD
from fastkd.models import create_model


def built(student, teacher, **rest):
    return fastkd.Distillation(create_model(student), create_model(teacher), "reviewkd", fold=False, **rest)


PAIRS = [
    ("resnet20", "resnet56", 0.6),
    ("resnet8", "resnet20", 1.0),
    ("resnet8x4", "resnet32x4", 5.0),
    ("wrn_16_1", "wrn_16_2", 5.0),
    ("wrn_16_1", "resnet8", 5.0),
    ("resnet8", "wrn_16_1", 5.0),
    ("resnet_32_20", "resnet8", 1.0),
]


@pytest.mark.parametrize(("student", "teacher", "beta"), PAIRS)
def test_every_pair_of_networks_has_its_weight_and_the_right_maps(student, teacher, beta):
    torch.manual_seed(3)
    distillation = built(student, teacher).eval()
    method = distillation.methods["reviewkd"]
    assert method.settled == {"beta": beta} and method.function.weight == beta
    if "resnet8" in (student, teacher):
        images = torch.randn(2, 3, 32, 32)
        term = distillation(images, torch.arange(2)).terms["reviewkd"]
        maps = distillation.student(images, features=True)[0]
        targets = distillation.teacher(images, features="preact")[0]
        levels = [[*side.stages, side.pooled[:, :, None, None]] for side in (maps, targets)]
        torch.testing.assert_close(term, beta * reviewed(*levels, method.levels), rtol=1e-4, atol=1e-5)
        assert [level.conv2[0].weight.shape[0] for level in method.levels] == [x.shape[1] for x in levels[1]]
        assert method.levels[0].conv1[0].weight.shape[0] == maps.pooled.shape[1]  # below 512


def test_the_teachers_maps_after_the_relu_are_an_option():
    distillation = built(
        "resnet8", "resnet8", options={"reviewkd": {"before_relu": False, "beta": 2.0}}
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    levels = [
        [*x.stages, x.pooled[:, :, None, None]]
        for x in (
            distillation.student(images, features=True)[0],
            distillation.teacher(images, features=True)[0],
        )
    ]
    method = distillation.methods["reviewkd"]
    torch.testing.assert_close(
        distillation(images).total, 2 * reviewed(*levels, method.levels), rtol=1e-4, atol=1e-5
    )


def test_the_weight_grows_over_a_twelfth_of_the_run():
    method = built("resnet8", "resnet8").methods["reviewkd"]
    assert [method.weight_at(epoch, 240) for epoch in (0, 1, 10, 20, 239)] == [0, 0.05, 0.5, 1, 1]
    assert [method.weight_at(epoch, 2) for epoch in (0, 1)] == [0, 1]
    other = built("resnet8", "resnet8", preset="mdistiller").methods["reviewkd"]
    assert isinstance(other, ReviewKD) and [other.weight_at(epoch, 240) for epoch in (0, 19)] == [0.05, 1]
    assert (
        built("resnet8", "resnet8", options={"reviewkd": {"warmup": 0.0}})
        .methods["reviewkd"]
        .weight_at(0, 240)
        == 1
    )


def test_it_is_one_graph_and_runs_under_autocast():
    torch.manual_seed(0)
    distillation = built("resnet8", "resnet8", autocast=torch.autocast("cpu", torch.bfloat16))
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    found = torch.compile(distillation, fullgraph=True, backend="eager")(images, labels).terms["reviewkd"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation(images, labels).terms["reviewkd"], rtol=1e-2, atol=1e-3)
    found.backward()
    assert all(
        x.grad.isfinite().all() and x.grad.any() for x in distillation.methods.parameters() if x.dim() > 1
    )


def test_the_first_weights_are_the_published_ones():
    level = ABF(30, 20, 40, fuses=True)
    # kaiming_uniform with a = 1: within sqrt(3 / fan_in), and nearly to it
    for layer in (level.conv1[0], level.conv2[0]):
        bound = (3 / layer.weight[0].numel()) ** 0.5
        assert layer.bias is None and 0.95 * bound < layer.weight.abs().max() <= bound
    assert level.attention.bias.any()


@pytest.mark.slow
def test_two_epochs_end_with_its_state_and_its_weight_in_the_row(small_main, tmp_path, capsys):
    flags = "--method reviewkd --dataset digits --teacher resnet8 --student resnet8 --epochs 2".split()
    assert small_main([*flags, "--device", "cpu", "--output", str(tmp_path), "--no-pictures"]) == 0
    assert "reviewkd.beta=1.0" in capsys.readouterr().out
    row = rows_of(tmp_path)[-1]
    assert "reviewkd.beta=1.0" in ",".join(row.values())
    folder = tmp_path / row["folder"]
    losses = [
        {name: float(value) for name, value in line.items() if "reviewkd" in name}
        for line in rows_in(folder / "epochs.csv")
    ]
    assert not any(losses[0].values()) and all(losses[1].values())
    best = torch.load(folder / "best.pt", weights_only=True)["model"]
    assert set(best) == set(create_model("resnet8").state_dict())  # the bare student
