"""Methods, recipes, the loop, and the files it leaves."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import loops
import pytest
import torch
import torch.nn.functional as F

from fastkd.distillation import Distillation
from fastkd.methods import METHODS, Distiller, Points, Preset, Term, define
from fastkd.methods.definition import Definition
from fastkd.models import create_model
from fastkd.training import RECIPES, Batches, Trainer, UserError, get_recipe, load_dataset
from fastkd.training.config import Config, Settings
from fastkd.training.progress import Progress
from fastkd.training.recipes import learning_rate

FP32 = torch.autocast("cpu", enabled=False)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def pair():
    """An untrained student and teacher, their outputs on a batch, and the batch."""
    torch.manual_seed(0)
    images, networks = torch.randn(6, 3, 32, 32), [create_model("resnet8").train() for _ in range(2)]
    with torch.no_grad():
        outputs = [Points.MAPS.observe(network, images) for network in copy.deepcopy(networks)]
    return networks, outputs, images, torch.randint(0, 10, (6,))


def by_formula(name, student, teacher, labels):
    """hankyul2's losses, from METHODS' formulas: CE, 1000 AT, mean FSP / 3, T^2 KL."""

    def attention(x):
        return F.normalize(x.pow(2).mean(1).flatten(1))

    def gram(a, b):
        a = F.adaptive_avg_pool2d(a, b.shape[-2:]).flatten(2)
        return a @ b.flatten(2).mT / b[0, 0].numel()

    total = {"ce": F.cross_entropy(student.logits, labels)}
    if "at" in name:
        pairs = zip(student.features.stages, teacher.features.stages, strict=True)
        total["at"] = 1000 * sum((attention(s) - attention(t)).pow(2).mean() for s, t in pairs)
    if "kd" in name:
        weight = 0.9 if name == "at+kd" else 1.0
        kl = F.kl_div(
            F.log_softmax(student.logits / 4, 1), F.softmax(teacher.logits / 4, 1), reduction="batchmean"
        )
        total["kd"] = weight * 16 * kl
    if name == "fsp":
        s, t = ([o.features.stem, *o.features.stages] for o in (student, teacher))
        total["fsp"] = sum((gram(s[i], s[i + 1]) - gram(t[i], t[i + 1])).pow(2).mean() for i in range(3)) / 9
    return total


ALL = [*METHODS, "at+kd"]


@pytest.mark.parametrize("name", ["baseline", "kd", "at", "fsp", "at+kd"])
def test_a_method_is_the_sum_of_the_published_terms(pair, name):
    networks, outputs, images, labels = pair
    distillation = Distillation(*copy.deepcopy(networks), name, preset="hankyul2", teacher_mode="train")
    with torch.no_grad():
        found, expected = distillation(images, labels), by_formula(name, *outputs, labels)
    assert list(found.terms) == list(expected)
    torch.testing.assert_close(found.terms, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, sum(expected.values()), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.student_logits, outputs[0].logits)


def test_unknown_names_are_told_with_the_known_ones():
    with pytest.raises(ValueError, match=r"nothing.*at\+kd"):
        define("nothing")
    with pytest.raises(ValueError, match=r"nobody.*hankyul2"):
        define("kd", preset="nobody")
    with pytest.raises(UserError, match=r"nobody.*hankyul2, zagoruyko.*digits"):
        get_recipe("nobody", {})


class Calls(list):
    """A list that copies of its owner go on with."""

    def __deepcopy__(self, memo):
        return self


class Spy(torch.nn.Module):
    """A model that notes what it was asked for."""

    def __init__(self):
        super().__init__()
        self.model, self.calls = create_model("resnet8"), Calls()

    def forward(self, x, features=False):
        self.calls.append((features, torch.is_grad_enabled(), self.training))
        return self.model(x, features=features)


def small_batches(count=64, batch_size=32, dtype=torch.float32, **options):
    images, labels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10
    return Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=batch_size, dtype=dtype, **options)


def loop_of(name, student=None, teacher=None, autocast=FP32, batches=None, **overrides):
    batches = batches or small_batches(dtype=torch.bfloat16 if autocast is BF16 else torch.float32)
    recipe = get_recipe("hankyul2", {"epochs": 2, "batch_size": batches.batch_size, **overrides})
    networks = student or create_model("resnet8"), teacher
    rest = {"train_labels": batches.labels, "batch_size": batches.batch_size, "epochs": recipe.epochs}
    made = Distillation(
        *networks, name, preset="hankyul2", teacher_mode=recipe.teacher_mode, autocast=autocast, **rest
    )
    return Trainer(made, batches, batches, recipe, autocast)


@pytest.mark.parametrize(
    ("name", "features"), [("baseline", None), ("kd", "pooled"), ("at", True), ("at+kd", True)]
)
def test_only_what_a_method_needs_is_computed(name, features):
    method = define(name)
    assert method.needs_teacher == (features is not None)
    for mode in ("eval", "train"):
        student, teacher = Spy(), Spy()
        loop = loop_of(name, student, teacher if method.needs_teacher else None, teacher_mode=mode)
        student.calls.clear()  # those that found the shapes, and the batch norms that can be folded
        teacher.calls.clear()
        loop.train_epoch(1, Progress("", 1))
        assert student.calls == 2 * [(features or False, True, True)] + 2 * [(False, False, False)]
        assert teacher.calls == ([] if features is None else 2 * [(features, False, mode == "train")])
        assert ("teacher" in loop.state()) == (mode == "train" and features is not None)


class Adapter(Distiller):
    """A method with a layer of its own."""

    presets = {"hankyul2": Preset()}

    def __init__(self, context, options):
        super().__init__(context, options)
        self.layer = torch.nn.Linear(*context.student_shapes.pooled, *context.teacher_shapes.pooled)

    def loss(self, batch, student, teacher, connected):
        return (self.layer(student.features.pooled) - teacher.features.pooled).square().mean()


def test_the_parameters_of_a_method_are_trained_and_kept():
    batches, recipe = small_batches(), get_recipe("hankyul2", {"epochs": 1})
    method = Definition(
        "adapter", (Term("adapter", Adapter, "hankyul2", Adapter.Options(), {}),), 0.0, "hankyul2", {}
    )
    loop = Trainer(
        Distillation(create_model("resnet8"), create_model("resnet8"), method), batches, batches, recipe, FP32
    )
    layer = loop.distillation.methods["adapter"].layer
    before = layer.weight.detach().clone()
    loop.train_epoch(1, Progress("", 2))
    assert not torch.equal(layer.weight, before)
    assert torch.equal(loop.state()["method"]["adapter.layer.weight"], layer.weight)


# Steps of methods whose terms go down sooner than others', in float32 after at most half as many; and of
# simkd, which fits a random map with nothing else in the sum, and takes 28. A step in bfloat16 takes seconds
# on processors that only emulate it.
STEPS = {"simkd": 40, "ofd": 16, "sakd": 16, **dict.fromkeys(("fitnet", "at", "at+kd", "rkd", "semckd"), 10)}


@pytest.mark.parametrize("autocast", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_every_term_goes_down_on_a_fixed_batch(name, autocast):
    torch.manual_seed(1)
    teacher = create_model("resnet8").eval() if name != "baseline" else None
    loop = loop_of(name, teacher=teacher, autocast=autocast, lr=0.02, teacher_mode="eval")
    drawn, step, readings = next(loop.batches.draw(1)), loop.train_step, []
    for _ in range(STEPS.get(name, 25)):
        before = step.sums.clone()
        step(drawn, len(drawn), Progress("", 25))
        readings.append(((step.sums - before)[:-1] / len(drawn)).tolist())
    first, last = (
        dict(zip(loop.distillation.names, values, strict=True)) for values in (readings[0], readings[-1])
    )
    assert sum(last.values()) < 0.8 * sum(first.values())
    for term in loop.distillation.names[1:]:
        assert last[term] < first[term], (term, first, last)


def test_a_short_digits_run_learns():
    data = load_dataset("digits", Path())
    train = Batches(
        data.train_images, data.train_labels, data.mean, data.std, batch_size=32, flip=False, drop_last=True
    )
    test = Batches(data.test_images, data.test_labels, data.mean, data.std, batch_size=360)
    recipe = get_recipe("digits", {"epochs": 3})
    loop = Trainer(Distillation(create_model("resnet8"), None, "baseline"), train, test, recipe, FP32)
    for epoch in (1, 2, 3):
        loop.train_epoch(epoch, Progress("", loop.steps))
    assert loop.best()["test_acc"] > 80
    assert loop.history[-1]["loss"] < 0.5 * loop.history[0]["loss"]
    assert [epoch["lr"] for epoch in loop.history] == pytest.approx([0.05, 0.005, 0.0005])


def test_an_epochs_figures_are_means_over_its_images():
    loop, seen = loops.loop_of("at+kd"), []
    loop.recipe = dataclasses.replace(loop.recipe, milestones=(0.5,))  # where the first of two epochs ends
    loop.distillation.register_forward_hook(lambda module, given, found: seen.append((given[1], found)))
    loop.train_epoch(1, Progress("", loop.steps))
    assert [len(labels) for labels, _ in seen] == [8] * 8 + [6]
    (line,) = loop.history
    for name in loop.distillation.names:
        mean = sum(found.terms[name].item() * len(labels) for labels, found in seen) / 70
        assert line[name] == pytest.approx(mean, rel=1e-5)
    assert line["loss"] == pytest.approx(sum(line[name] for name in loop.distillation.names))
    right = sum((found.student_logits.argmax(1) == labels).sum().item() for labels, found in seen)
    assert line["train_acc"] == pytest.approx(100 * right / 70)
    assert line["lr"] == loop.optimizer.param_groups[0]["lr"] == 0.0625
    loop.history = [{"seconds": 1, "images_per_second": 100}, {"seconds": 3, "images_per_second": 20}]
    assert loop.pace() == 40


def test_the_best_weights_stay_and_are_tested_in_eval_mode():
    loop = loops.loop_of("baseline")
    loop.train_epoch(1, Progress("", loop.steps))
    assert not loop.student.training
    with torch.no_grad():
        right = sum((loop.student(x).argmax(1) == y).sum().item() for x, y in loop.test_batches.test())
    assert loop.history[0]["test_acc"] == pytest.approx(100 * right / 70)
    loop.history[0]["test_acc"] = 101.0  # which no other epoch reaches
    best = copy.deepcopy(loop.best_weights)
    loop.train_epoch(2, Progress("", loop.steps))
    now = loop.student.state_dict()
    assert all(torch.equal(loop.best_weights[name], value) for name, value in best.items())
    assert not torch.equal(best["conv1.weight"], now["conv1.weight"]) and best.keys() == now.keys()


def test_a_loss_that_is_no_number_stops_the_run():
    with pytest.raises(UserError, match=r"no longer finite in epoch 1.*--lr"):
        loop_of("baseline", lr=1e30).train_epoch(1, Progress("", 4))


def test_accuracy_is_over_all_test_images_unless_asked_otherwise():
    student = Spy()
    loop = loop_of("baseline", student, batches=small_batches(70, 32))
    loop.train_epoch(1, Progress("", 3))
    right = 0
    for images, labels in loop.test_batches.test():
        right += (student(images).argmax(1) == labels).sum().item()
    assert loop.history[0]["test_acc"] == pytest.approx(100 * right / 70)


def test_milestones_keep_their_place_in_a_shorter_run():
    recipe = RECIPES["hankyul2"]
    for epochs, steps in ((200, 390), (5, 390), (5, 4)):
        rates = [learning_rate(recipe, step, epochs * steps) for step in range(epochs * steps)]
        drops = [step for step in range(1, len(rates)) if rates[step] < rates[step - 1]]
        assert drops == [math.ceil(epochs * steps / 2), math.ceil(epochs * steps * 3 / 4)]
        assert rates[0] == 0.1 and rates[-1] == pytest.approx(0.001) and rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"batch_size": 1}, "--batch-size is 1"),
        ({"lr": 0.0}, "--lr is 0.0, wanted a positive"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"weight_decay": -1.0}, "--weight-decay is -1.0"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov"),
    ],
)
def test_values_that_cannot_be_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        get_recipe("hankyul2", overrides)


def test_a_teacher_and_a_student_of_one_architecture_begin_apart(tmp_path):
    plan = Config(Settings("fsp", "digits", student="resnet8", teacher="resnet8", output=tmp_path))
    state = torch.get_rng_state()
    student, again, teacher = (
        plan.new_model(role).conv1.weight for role in ("student", "student", "teacher")
    )
    assert torch.equal(student, again) and not torch.equal(student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    first, other = (next(plan.batches(role)[0].train(1))[1] for role in ("student", "teacher"))
    assert not torch.equal(first, other)


def test_models_that_do_not_fit_the_method_are_told_before_any_training(tmp_path):
    with pytest.raises(
        UserError, match="method fsp does not fit resnet8x4 as teacher and resnet8 as student"
    ) as caught:
        Config(Settings("fsp", "digits", student="resnet8", teacher="resnet8x4", output=tmp_path))
    assert "\n" not in str(caught.value)
    Config(Settings("at", "digits", student="resnet8", teacher="resnet8x4", output=tmp_path))
