"""What Distillation is built of and called with: misuse is one line before any training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fastkd
from fastkd.models import create_model

POINTS = {"student_points": ["2", "5"], "teacher_points": ["2", "5"]}
MEAN, STD = (0.5,) * 3, (0.2,) * 3


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def run(method="at", student=None, teacher=None, index=None, images=None, **options):
    student, teacher = student or network(), teacher or network()
    distillation = fastkd.Distillation(student, teacher, method, **{**POINTS, **options})
    images = torch.randn(4, 3, 32, 32) if images is None else images
    return distillation(images, torch.arange(len(images)), index)


def data_margins(batches):
    return {"method": "ofd", "options": {"ofd": {"margin": "data"}}, "train_images": batches}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": ["at"]}, TypeError, r"method is \['at'\], wanted a name"),
        ({"student": len}, TypeError, "student is builtin_function_or_method, wanted a torch.nn.Module"),
        ({"teacher": 3}, TypeError, "teacher is int, wanted a torch.nn.Module$"),
        ({"teacher": [network()]}, TypeError, r"teacher is list, .* \(SeveralTeachers takes a list\)"),
        ({"options": "beta=3"}, TypeError, "options is 'beta=3', wanted them by term"),
        ({"student_points": []}, ValueError, r"student_points is \[\], but method 'at' reads maps"),
        ({"classifier": 8}, TypeError, "classifier is 8, wanted the name of a submodule, or a pair"),
        ({"classifier": ("8", "8", "8")}, TypeError, "classifier is .*, wanted the name of a submodule"),
        ({"image_shape": 32}, TypeError, r"image_shape is 32, wanted \(C, H, W\)"),
        ({"autocast": True}, TypeError, "autocast is True, wanted a torch.autocast or None"),
        ({"image_shape": (3, -1, 32)}, ValueError, r"image_shape is \(3, -1, 32\), wanted \(C, H, W\), each"),
        ({"seed": "a"}, TypeError, "seed is 'a', wanted a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, wanted at least 1"),
        ({"num_classes": 0}, ValueError, "num_classes is 0, wanted at least 1"),
        ({"epochs": np.int64(-1)}, ValueError, "epochs is -1, wanted at least 1"),
        (
            {"method": fastkd.methods.define("at"), "options": {"at": {"beta": 1}}},
            ValueError,
            "options is {'at': {'beta': 1}}, but method is a Definition: give options to define",
        ),
        (
            {"method": fastkd.methods.define("at"), "preset": "kdzoo"},
            ValueError,
            "preset is 'kdzoo', but method is a Definition: give preset to define",
        ),
        ({"epochs": 1.5}, TypeError, "epochs is 1.5, wanted a whole number"),
        (
            {"normalization": (MEAN[:2], STD[:2]), "teacher_normalization": (MEAN, STD)},
            ValueError,
            r"normalization is \(\(0.5, 0.5\), .*, wanted \(mean, std\) of 3 channels, each",
        ),
        (
            {"normalization": (MEAN, STD), "teacher_normalization": (MEAN, (0, 0, 0))},
            ValueError,
            "teacher_normalization is .* each deviation above 0",
        ),
        (
            {"normalization": "imagenet", "teacher_normalization": "cifar"},
            ValueError,
            r"normalization is 'imagenet', wanted \(mean, std\)",
        ),
        (data_margins(torch.randn(4, 3, 32, 32)), TypeError, "train_images is Tensor, wanted batches"),
        (data_margins(3), TypeError, "train_images is int, wanted batches"),
        (data_margins([{}]), TypeError, r"train_images\[0\] is dict, wanted images of floating point"),
        (
            data_margins([torch.zeros(2, 3, 32, 32).byte()]),
            TypeError,
            r"train_images\[0\] is \(2, 3, 32, 32\) uint8",
        ),
        (data_margins([torch.full((2, 3, 32, 32), torch.nan)]), ValueError, r"margins\[0\] has nan"),
    ],
)
def test_what_it_is_built_of_is_told_in_one_line(options, error, words):
    with pytest.raises(error, match=f"^{words}") as caught:
        run(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"index": torch.arange(4.0)}, TypeError, r"index is \(4,\) float32 on cpu, wanted int64"),
        ({"index": torch.arange(3)}, ValueError, r"index is \(3,\) int64 on cpu, wanted \(4,\)"),
        ({"index": [0, 1, 2, 3]}, TypeError, r"index is list, wanted a tensor \(N,\) of int64"),
        ({"train_labels": [0, 1]}, TypeError, r"train_labels is list, wanted a tensor \(N,\) of int64"),
        (
            {"train_labels": torch.rand(40)},
            TypeError,
            r"train_labels is \(40,\) float32 on cpu, wanted int64",
        ),
        ({"train_labels": torch.zeros(4, 2).long()}, ValueError, r"train_labels is \(4, 2\) int64 on cpu"),
        (
            {"options": {"crd": {"negatives": "batch", "queue": 5}}},
            ValueError,
            "option crd: queue is 5, but negatives is batch: leave it out",
        ),
    ],
)
def test_numbers_of_images_are_told_in_one_line(options, error, words):
    given = {"train_labels": torch.arange(40) % 10, "index": torch.arange(4), **options}
    with pytest.raises(error, match=f"^{words}") as caught:
        run("crd", **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_a_neck_in_a_sequential_is_no_last_layer(method):
    losses = run(method)
    assert losses.total.isfinite() and losses.student_logits.shape == (4, 10)


@pytest.mark.parametrize("method", ["kd", "dkd", "at+kd", "sakd"])
def test_other_class_counts_are_told_before_the_first_step(method):
    student, teacher = create_model("resnet8", 5), create_model("resnet8", 7)
    name = "dkd" if method == "dkd" else "kd"
    words = f"student has 5 classes, teacher has 7: {name} compares logits, wanted as many"
    with pytest.raises(ValueError, match=words):
        fastkd.Distillation(student, teacher, method)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    assert fastkd.Distillation(student, teacher, "at")(images, labels).total.isfinite()  # compares maps alone


def test_a_teacher_is_not_the_student():
    """Frozen as the teacher, it would learn nothing."""
    student = network()
    with pytest.raises(ValueError, match="teacher is the student itself, wanted a network of its own"):
        run(student=student, teacher=student)
    with pytest.raises(ValueError, match="teacher holds the student's parameter 0.weight, wanted a network"):
        run(student=student, teacher=nn.Sequential(*student))
    assert all(parameter.requires_grad for parameter in student.parameters())
    student[0].requires_grad_(False)  # a part that nobody trains may be common to both
    teacher = network()
    teacher[0] = student[0]
    assert run(student=student, teacher=teacher).total.isfinite()


def test_numpys_seed_is_that_of_python():
    found = []
    for seed in (3, np.int64(3), 4):
        made = fastkd.Distillation(network(), network(), "srrl", seed=seed)
        found.append(made.methods["srrl"].connector[0].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_labels_that_are_no_tensor_are_told():
    distillation = fastkd.Distillation(network(), network(), "kd")
    with pytest.raises(TypeError, match="^labels is list, wanted a tensor \\(N,\\) of int64"):
        distillation(torch.randn(2, 3, 32, 32), [0, 1])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ((-1, 4), ValueError, "epoch is -1 of 4, wanted one from 0 to epochs - 1"),
        ((4, 4), ValueError, "epoch is 4 of 4, wanted one from 0 to epochs - 1"),
        ((0, 0), ValueError, "epoch is 0 of 0, wanted one from 0 to epochs - 1"),
        ((1.0, 4), TypeError, "epoch is 1.0, wanted a whole number"),
        ((0, None), TypeError, "epochs is None, wanted a whole number"),
        ((True, 4), TypeError, "epoch is True, wanted a whole number"),
        ((np.True_, 4), TypeError, f"epoch is {np.True_!r}, wanted a whole number"),
        ((np.float64(1), 4), TypeError, r"epoch is .*1\.0.*, wanted a whole number"),
        ((torch.tensor(1), 4), TypeError, r"epoch is tensor\(1\), wanted a whole number"),
        ((np.int64(4), np.uint8(4)), ValueError, "epoch is 4 of 4, wanted one from 0 to epochs - 1"),
    ],
)
@pytest.mark.parametrize("method", ["kd", "reviewkd"])  # without a schedule, and with one
def test_an_epoch_outside_the_run_is_one_line(method, given, error, words):
    distillation = fastkd.Distillation(create_model("resnet8"), create_model("resnet8"), method)
    with pytest.raises(error, match=f"^{words}$"):
        distillation.set_epoch(*given)


def test_epochs_and_sizes_may_be_numpys_numbers():
    networks = create_model("resnet8"), create_model("resnet8")
    given = {"batch_size": np.int64(4), "image_shape": (np.int32(3), np.int64(32), 32)}
    distillation, same = (fastkd.Distillation(*networks, "dkd", **rest) for rest in (given, {}))
    distillation.set_epoch(np.int64(3), np.uint8(200))
    same.set_epoch(3, 200)
    assert torch.equal(distillation.methods.weights, same.methods.weights)
    assert not torch.equal(same.methods.weights, torch.ones_like(same.methods.weights))


@pytest.mark.parametrize("method", ["fitnet", "crd", "srrl", "simkd", "norm"])  # which learn on the teacher's
def test_what_a_teacher_said_in_inference_mode_is_learned_from(method):
    student, teacher = create_model("resnet8"), create_model("resnet8")
    made = fastkd.Distillation(student, teacher, method, train_labels=torch.arange(40) % 10)
    images, rest = torch.randn(4, 3, 32, 32), (torch.arange(4), torch.arange(4))
    with torch.inference_mode():
        taught = made.ask(images)
    assert taught.logits.is_inference()
    losses = made.eval()(images, *rest, taught=taught)
    losses.total.backward()
    assert torch.equal(losses.total, made(images, *rest).total)


@pytest.mark.parametrize(("label", "told"), [(-1, "-1"), (10, "10"), (-99, "-99")])
def test_labels_that_are_no_classes_are_one_line(label, told):
    distillation = fastkd.Distillation(network(), network(), "kd")
    labels = torch.tensor([3, -100, label, 9])
    with pytest.raises(ValueError, match=f"^labels has {told}, wanted 0 to 9, or -100 for none$"):
        distillation(torch.randn(4, 3, 32, 32), labels)


def test_labels_that_cross_entropy_takes_are_taken():
    distillation, images = fastkd.Distillation(network(), network(), "rkd").eval(), torch.randn(4, 3, 32, 32)
    some, shares = torch.tensor([3, -100, 0, 9]), torch.randn(4, 10).softmax(1)
    for labels in (some, shares):
        wanted = torch.nn.functional.cross_entropy(distillation.student(images), labels)
        torch.testing.assert_close(distillation(images, labels).terms["ce"], wanted)


def test_labels_without_values_are_not_looked_at():
    """Under torch.func, where each sample has its own, and as fake tensors."""
    methods = fastkd.Distillation(network(), network(), "rkd").methods
    logits, labels = torch.randn(4, 10), torch.tensor([3, 0, 9, 1])
    each = torch.func.vmap(lambda z, y: methods.cross_entropy(z[None], y[None])["ce"])(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(each, wanted)
    with FakeTensorMode():
        assert methods.cross_entropy(torch.randn(4, 10), torch.zeros(4).long())["ce"].shape == ()
