"""Every method on every pair of networks of the published table, and one line where a method cannot be."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re

import pytest
import torch

import fastkd
from fastkd.methods import METHODS, BuildContext, create_method, define
from fastkd.methods.base import paired_stages
from fastkd.models import create_model
from fastkd.training.recipes import SETTINGS

# the table's settings a to j, its column that is none of them, and RepDistiller's pair of width 4
PAIRS = [*dict.fromkeys([*SETTINGS.values(), ("wrn_40_2", "wrn_40_1"), ("resnet32x4", "resnet8x4")])]
WRAPPING = ("simkd", "norm")  # only one method of a sum may change the student
IMAGES, CLASSES = 8, 3  # of 4 images SemCKD would have vectors of one number, which are always 1 or -1
LABELS = torch.arange(3 * IMAGES) % CLASSES


@functools.cache
def network(name):
    """With the statistics of some images in its batch norms: else a deep network's eval mode overflows."""
    torch.manual_seed(len(name))
    made = create_model(name, CLASSES)
    norms = [module for module in made.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        made.train()(torch.randn(8, 3, 32, 32))
    for norm in norms:
        norm.momentum = 0.1
    return made


def distillation(pair, name):
    teacher, student = network(pair[0]), copy.deepcopy(network(pair[1])).requires_grad_(True)
    words = ["ce.weight=1", "crd.k=2"][: 2 if "crd" in name else 1]
    if "kd" in name.split("+"):
        words.append("kd.weight=1")
    method = define(name, preset="repdistiller", words=words)
    return fastkd.Distillation(
        student, teacher, method, train_labels=LABELS, batch_size=IMAGES, epochs=240
    ).train()


def channels(name):
    features = network(name)(torch.zeros(2, 3, 32, 32), features=True)[0]
    return [x.shape[1] for x in (features.stem, *features.stages)]


@pytest.mark.parametrize(
    "pair",
    [p if p == ("wrn_40_2", "wrn_40_1") else pytest.param(p, marks=pytest.mark.slow) for p in PAIRS],
    ids="<-".join,
)
def test_every_method_trains_every_pair_of_the_table(one_thread, pair):
    """One forward pass for the methods that leave the student as it is, since in a sum they do not meet."""
    together = [name for name in METHODS[1:] if name not in WRAPPING]
    if channels(pair[0]) != channels(pair[1]):
        together.remove("fsp")
        with pytest.raises(ValueError, match="fsp wanted equal channels"):
            distillation(pair, "fsp")
    images, labels, index = torch.randn(IMAGES, 3, 32, 32), LABELS[:IMAGES], torch.arange(IMAGES)
    seen = []
    for names in ("+".join(together), *WRAPPING):
        made = distillation(pair, names)
        made.set_epoch(30, 240)  # no schedule begins at 0 there
        losses = made(images, labels, index)
        for name in made.methods:
            own = dict(made.methods[name].named_parameters())
            grads = torch.autograd.grad(
                losses.terms[name], [made.student.conv1.weight, *own.values()], retain_graph=True
            )
            assert losses.terms[name].isfinite() and losses.terms[name] > 0, name
            assert all(grad.isfinite().all() for grad in grads), name
            # a bias before a batch norm moves nothing
            zero = [
                key
                for key, grad in zip(["student", *own], grads, strict=True)
                if grad.dim() > 1 and not grad.any()
            ]
            assert not zero, (name, zero)
            seen.append(name)
        made.update(index, losses.records)
    assert sorted(seen) == sorted({*METHODS[1:]} - ({"fsp"} - {*together}))


SIZES = r"student's stage 1 is \(16, 28, 28\), teacher's is \(16, 32, 32\): {} wanted maps of one size"
CANNOT = {  # methods that a pair cannot have; all others can
    ("resnet20", "resnet_32_20"): {"ofd": SIZES.format("ofd"), "sakd": SIZES.format("sakd")},
    ("resnet_32_20", "resnet20"): {
        "ofd": "student's stage 1 is .*32, 32.*, teacher's is .*28, 28",
        "sakd": "student's stage 1 is .*32, 32.*, teacher's is .*28, 28",
        "norm": r"student's last map is \(64, 8, 8\), the teacher's \(64, 7, 7\): norm",
    },
    ("wrn_16_2", "resnet8"): {
        "fsp": r"student's stage 1 is \(16, 32, 32\), teacher's is \(32, 32, 32\): fsp wanted equal channels"
    },
    ("resnet8x4", "resnet8"): {
        "fsp": r"student's stage 0 is \(16, 32, 32\), teacher's is \(32, 32, 32\): fsp wanted equal channels"
    },
}


@pytest.mark.parametrize("pair", CANNOT, ids="<-".join)
def test_what_a_pair_cannot_have_names_both_shapes_before_the_first_step(one_thread, pair):
    teacher, student = network(pair[0]), network(pair[1])
    context = BuildContext.of(student, teacher, train_labels=LABELS, batch_size=IMAGES)
    refused = {}
    for name in METHODS[1:]:
        fresh = dataclasses.replace(context, student=copy.deepcopy(student))  # which two methods change
        try:
            create_method(name, fresh, options={"crd": {"k": 2}} if name == "crd" else {})
        except ValueError as error:
            refused[name] = str(error)
    distillation(pair, "+".join({*METHODS[1:]} - {*WRAPPING, *refused})).check(IMAGES)
    assert refused.keys() == CANNOT[pair].keys()
    for name, text in refused.items():
        assert re.search(CANNOT[pair][name], text) and "\n" not in text, text


@pytest.mark.parametrize(("pair", "name"), [(p, name) for p in CANNOT for name in CANNOT[p]])
def test_the_command_says_so_in_one_line_and_leaves_no_folder(small_main, tmp_path, capsys, pair, name):
    flags = [
        "--method",
        name,
        "--dataset",
        "digits",
        "--teacher",
        pair[0],
        "--student",
        pair[1],
        "--device",
        "cpu",
    ]
    assert small_main([*flags, "--output", str(tmp_path / "runs")]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 and not (tmp_path / "runs").exists()
    assert f"method {name} does not fit {pair[0]} as teacher and {pair[1]} as student" in text
    assert re.search(CANNOT[pair][name], text), text


class OfTwo(torch.nn.Module):
    """A network with two stages to name."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 6, 3, padding=1)
        self.fc = torch.nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(self.two(self.one(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", ["ofd", "sakd", "reviewkd", "fsp"])
def test_stages_of_another_number_are_one_line(name):
    points = {"student_points": ["one", "two"]} | (
        {"options": {"ofd": {"margin": "batch"}}} if name == "ofd" else {}
    )
    with pytest.raises(
        ValueError, match=f"student has . stages, teacher has .: {name} wanted the same number"
    ):
        fastkd.Distillation(OfTwo(), network("resnet8"), name, **points)


@pytest.mark.parametrize(
    ("other", "same", "fits"),
    [
        ((4, 2, 3), "size", True), ((9, 2, 3), "size", True), ((4, 5, 3), "size", False),
        ((4, 2, 5), "size", False), ((4, 7, 7), "channels", True), ((5, 2, 3), "channels", False),
        ((5, 7, 7), "", True),
    ],
)  # fmt: skip
def test_what_must_be_equal_in_a_pair(other, same, fits):
    student, teacher = [(1, 1, 1), (4, 2, 3)], [(1, 1, 1), other]
    if fits:
        assert paired_stages("x", student, teacher, same) == [*zip(student, teacher, strict=True)]
        return
    with pytest.raises(
        ValueError, match=re.escape(f"student's stage 2 is (4, 2, 3), teacher's is {other}: x")
    ):
        paired_stages("x", student, teacher, same)
