"""Recipes by name: what each field does, and the shares of the losses."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
from support_data import small_digits
from torch import nn

import fastkd
from fastkd import data as datasets
from fastkd.distillation import Distillation
from fastkd.methods import METHODS, define
from fastkd.models import create_model
from fastkd.models.specs import stages_of
from fastkd.training import RECIPES, Batches, Settings, Trainer, UserError, get_recipe, run
from fastkd.training.config import Config
from fastkd.training.phases import phase_trainer
from fastkd.training.progress import Progress
from fastkd.training.recipes import learning_rate

FP32 = torch.autocast("cpu", enabled=False)


@pytest.fixture
def digits(monkeypatch, one_thread):
    monkeypatch.setattr(datasets, "_LOADERS", dict(datasets._LOADERS))
    small_digits()


def batches(count=64, batch_size=32, **options):
    images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10
    return Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=batch_size, **options)


def four_stages(width):
    """A network with the stages of a ResNet for ImageNet, by their names there."""
    torch.manual_seed(width)
    parts = [nn.Sequential(nn.Conv2d(3 if i == 0 else width, width, 3, 2, 1), nn.ReLU()) for i in range(4)]
    stages = {f"layer{i}": part for i, part in enumerate(parts, 1)}
    return nn.Sequential(
        OrderedDict(**stages, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(width, 3))
    )


# per recipe: the rate of the first epoch after each published drop, in epochs from 0
@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("hankyul2", {99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001}),
        ("zagoruyko", {59: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}),
        ("repdistiller", {149: 0.05, 150: 0.005, 180: 0.0005, 210: 0.00005}),
        ("mdistiller", {149: 0.05, 150: 0.005, 180: 0.0005, 210: 0.00005}),
        ("kdzoo", {99: 0.1, 100: 0.01, 150: 0.001}),
        ("sakd", {149: 0.05, 150: 0.005, 180: 0.0005, 210: 0.00005}),
        ("imagenet", {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 99: 0.0001}),
    ],
)
def test_rates_drop_where_they_were_published_to(name, rates):
    recipe = get_recipe(name, {})
    for steps in (390, 391, 781, 782, 5004, 5005):
        for epoch, rate in rates.items():
            total = recipe.epochs * steps
            assert learning_rate(recipe, epoch * steps, total) == pytest.approx(rate)
            assert learning_rate(recipe, (epoch + 1) * steps - 1, total) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("preset", "alone", "beside"),
    [
        ("hankyul2", (1, 1), (1, 0.9)),
        ("zagoruyko", (0.1, 0.9), (0.1, 0.9)),
        ("repdistiller", (0.1, 0.9), (1, 1)),
        ("mdistiller", (0.1, 0.9), (0.1, 0.9)),
        ("kdzoo", (1, 0.1), (1, 0.1)),
        ("sakd", (1, 0.9), (1, 0.9)),
        (RECIPES["imagenet"].preset, (0.1, 0.9), (0.1, 0.9)),  # its authors', as zagoruyko
    ],
)
def test_losses_have_their_published_shares(preset, alone, beside):
    student, teacher, labels = create_model("resnet8").eval(), create_model("resnet8").eval(), torch.arange(6)
    images = torch.randn(6, 3, 32, 32)
    plain = {}
    with torch.no_grad():
        for method, shares in (
            ("baseline", (1, 0)),
            ("kd", alone),
            ("at+kd", beside),
            ("at", (1, 0)),
            ("fsp", (1, 0)),
        ):
            found = Distillation(student, teacher, method, preset=preset).eval()(images, labels).terms
            plain.setdefault("ce", found["ce"])
            torch.testing.assert_close(found["ce"], plain["ce"] * shares[0])
            if "kd" in found:
                plain.setdefault("kd", found["kd"] / shares[1])
                torch.testing.assert_close(found["kd"], plain["kd"] * shares[1])


def test_imagenet_is_trained_as_its_authors_did():
    """szagoruyko/attention-transfer's imagenet.py: plain momentum, AT at the ends of all four stages."""
    recipe = get_recipe("imagenet", {})
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.gamma) == (100, 256, 0.1, 0.1)
    assert (recipe.weight_decay, recipe.momentum, recipe.nesterov, recipe.new_optimizer) == (
        1e-4,
        0.9,
        False,
        True,
    )
    assert recipe.init_epochs == 0 and recipe.teacher_mode == "eval" and not recipe.drop_last
    student, teacher = four_stages(4), four_stages(8)
    assert stages_of(student) == stages_of(teacher) == ("layer1", "layer2", "layer3", "layer4")
    made = Distillation(
        student,
        teacher,
        "at",
        preset=recipe.preset,
        student_points=stages_of(student),
        teacher_points=stages_of(teacher),
    ).eval()
    images = torch.randn(3, 3, 64, 64)
    beta = fastkd.AttentionTransfer.preset("zagoruyko").weight
    ours, theirs = (fastkd.extract(x, stages_of(x))(images)[0] for x in (student, teacher))
    pairs = [fastkd.attention_transfer_loss(s, t, weight=beta) for s, t in zip(ours, theirs, strict=True)]
    found = made(images, torch.arange(3)).terms["at"]
    torch.testing.assert_close(found, sum(pairs))
    assert min(pairs) > 0.01 * found  # none of the four is nothing


def test_a_new_optimizer_at_a_drop_forgets_its_momenta():
    torch.manual_seed(0)
    data, first = batches(), create_model("resnet8")
    ends = []
    for new in (False, True):
        student = copy.deepcopy(first)
        recipe = get_recipe(
            "sakd", {"epochs": 2, "batch_size": 32, "milestones": (0.5,), "new_optimizer": new}
        )
        loop = Trainer(Distillation(student, None, "baseline"), data, data, recipe, FP32)
        loop.train_epoch(1, Progress("", 4))
        middle = copy.deepcopy(student)
        loop.train_epoch(2, Progress("", 4))
        ends.append(student.conv1.weight.detach())
    # the second epoch with an optimizer that is really new
    recipe = dataclasses.replace(recipe, lr=recipe.lr * recipe.gamma, milestones=(), new_optimizer=False)
    loop = Trainer(Distillation(middle, None, "baseline"), data, data, recipe, FP32)
    loop.train_epoch(2, Progress("", 4))
    assert torch.equal(middle.conv1.weight.detach(), ends[1]) and not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("model", ["resnet8", "wrn_16_1"])
def test_the_first_phase_of_fsp_moves_the_features_only(digits, tmp_path, model):
    plan = Config(
        Settings(
            "fsp",
            "digits",
            teacher=model,
            student=model,
            recipe="kdzoo",
            overrides={"epochs": 4, "batch_size": 32},
            output=tmp_path,
        )
    )
    (name, recipe, method), (second, whole, after) = plan.phases(plan.method)
    assert (name, recipe.epochs, recipe.lr, second, whole.epochs, after.names) == (
        "init",
        1,
        0.01,
        "main",
        4,
        ("ce",),
    )
    assert method.names == ("fsp",) and not after.needs_teacher
    student = plan.new_model("student")
    before = copy.deepcopy(student.state_dict())
    distillation = Distillation(student, plan.new_model("teacher"), method)
    loop = Trainer(distillation, plan.batches("student")[0], None, recipe, FP32)
    loop.train_epoch(1, Progress("", 2))
    still = {key for key, value in student.named_parameters() if torch.equal(value, before[key])}
    assert still == {"fc.weight", "fc.bias"} | (
        {"bn1.weight", "bn1.bias"} if model.startswith("wrn") else set()
    )
    assert "test_acc" not in loop.history[0] and loop.best_weights == {}


def test_each_phase_draws_images_of_its_own(digits, tmp_path):
    """The first epoch of one phase is not the first epoch of the other once more."""
    overrides = {"epochs": 4, "batch_size": 32}
    plan = Config(Settings("fsp", "digits", recipe="kdzoo", overrides=overrides, output=tmp_path))
    networks, batches = (plan.new_model("student"), plan.new_model("teacher")), plan.batches("student")

    def first_epoch(phase):
        train = phase_trainer(plan, "student", phase, *networks, batches).batches
        return torch.cat([train.inputs(drawn)[2] for drawn in train.draw(1)])

    first, again, other = [first_epoch(plan.phases(plan.method)[i]) for i in (0, 0, 1)]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_test_set_is_shuffled_alike_before_its_last_batch_is_left_out(digits, tmp_path):
    def test_labels(seed, drop):
        overrides = {"batch_size": 24, "drop_last_test": drop}
        plan = Config(
            Settings("at", "digits", recipe="hankyul2", overrides=overrides, seed=seed, output=tmp_path)
        )
        return torch.cat([labels for _, labels in plan.batches("student")[1].test()]), plan.data.test_labels

    (one, labels), (other, _), (all_of_them, _) = (
        test_labels(0, True),
        test_labels(5, True),
        test_labels(0, False),
    )
    assert (
        len(labels) == 64 and len(one) == 48 and torch.equal(one, other) and torch.equal(all_of_them, labels)
    )
    assert not torch.equal(one, labels[:48])


def test_constants_belong_to_their_sets(digits, tmp_path):
    def constants(normalization, name):
        plan = Config(Settings("at", "digits", overrides={"normalization": normalization}, output=tmp_path))
        plan.data = dataclasses.replace(plan.data, name=name)
        test = plan.batches("student")[1]
        return [1 / (255 * test.scale[0, 0, 0].item()), -(test.shift / (255 * test.scale))[0, 0, 0].item()]

    assert (
        constants("ofd", "cifar10")
        == constants("ofd", "cifar100")
        == pytest.approx([63.0 / 255, 125.3 / 255])
    )
    assert constants("repdistiller", "cifar100") == pytest.approx([0.2675, 0.5071])
    assert (
        constants("repdistiller", "cifar10") == constants("ofd", "digits") == pytest.approx([0.3228, 0.3053])
    )


@pytest.mark.parametrize("report", ["best", "last"])
def test_the_reported_epoch_is_the_teachers_too(digits, tmp_path, report):
    overrides = {"epochs": 4, "batch_size": 32, "report": report, "lr": 0.3}
    row = run(
        Settings(
            "kd",
            "digits",
            teacher="resnet8",
            student="resnet8",
            overrides=overrides,
            output=tmp_path,
            device="cpu",
        )
    )
    assert row["reported_acc"] == (row["acc"] if report == "best" else row["last_acc"])
    (teacher,), (last,) = tmp_path.glob("teachers/*.pt"), tmp_path.glob("teacher-*/last.pt")
    kept, last = torch.load(teacher, weights_only=True), torch.load(last, weights_only=True)
    wanted = last["model"] if report == "last" else last["best"]
    assert all(torch.equal(kept["model"][key], value) for key, value in wanted.items())
    assert kept["epoch"] == (
        4 if report == "last" else max(last["history"], key=lambda epoch: epoch["test_acc"])["epoch"]
    )
    assert "report=" + report in row["overrides"]


def test_every_recipe_serves_every_method():
    for name, recipe in RECIPES.items():
        for method in (*METHODS, "at+kd"):
            assert define(method, preset=recipe.preset).needs_teacher == (method != "baseline"), name


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"milestones": (0.5, 1.5)}, "--milestones"),
        ({"milestones": (0.7, 0.5)}, "growing"),
        ({"init_epochs": -1}, "--init-epochs is -1"),
        ({"init_lr": 0.0}, "--init-lr is 0.0, wanted a positive"),
    ],
)
def test_values_that_cannot_be_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        get_recipe("kdzoo", overrides)


def test_a_setting_stands_in_for_what_is_not_said():
    from fastkd.training.settings import Models, recipe_of, resolve

    assert resolve(Settings("at")) == Models("resnet20", "resnet20", "auto")
    assert resolve(Settings("at", setting="f")) == Models("wrn_40_2", "wrn_16_2", "cifar100")
    assert resolve(Settings("at", "cifar10", setting="c", student="resnet8")) == Models(
        "resnet110", "resnet8", "cifar10"
    )
    assert [
        recipe_of(Settings("at", setting=s), d)
        for s, d in ((None, "cifar10"), ("a", "cifar100"), ("a", "digits"))
    ] == ["hankyul2", "sakd", "digits"]
    assert recipe_of(Settings("at", setting="a", recipe="kdzoo"), "cifar100") == "kdzoo"
    with pytest.raises(UserError, match="setting 'k' is not known"):
        resolve(Settings("at", setting="k"))
