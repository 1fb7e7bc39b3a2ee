"""Distillation of networks that are none of ours."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain_networks import Foreign
from torch import nn

import fastkd
from fastkd import errors
from fastkd.models import create_model


class Plain(nn.Module):
    """A network as anybody writes it: an activation that works in place, a pooling by hand, a second linear
    layer before the last.
    """

    def __init__(self, width, classes=7, by_hand=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.body = nn.ModuleDict(
            {"one": nn.Conv2d(width, width, 3, 2, 1), "two": nn.Conv2d(width, 2 * width, 3, 2, 1)}
        )
        self.act, self.pool = nn.ReLU(), None if by_hand else nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.body["one"](self.stem(x))
        x = self.act(self.body["two"](x))
        pooled = x.mean((2, 3)) if self.pool is None else self.pool(x).flatten(1)
        self.gate(pooled)
        return self.head(pooled)


POINTS = ["stem", "body.one", "body.two"]


def pair():
    torch.manual_seed(2)
    return Plain(5), Plain(8, by_hand=False)


def batch(n=4):
    return torch.randn(n, 3, 32, 32), torch.arange(n) % 7


def by_hand(network, x):
    stem = network.stem(x)
    one = network.body["one"](stem)
    two = network.body["two"](one)
    return [stem, one, two], two.relu()


def test_named_submodules_are_the_stages():
    student, teacher = pair()
    state, images = list(student.state_dict()), batch()
    distillation = fastkd.Distillation(
        student, teacher, "at+rkd", preset="repdistiller", student_points=POINTS, teacher_points=POINTS
    )
    distillation.eval()
    losses = distillation(*images)
    (stages, final), (theirs, last) = by_hand(student, images[0]), by_hand(teacher, images[0])
    torch.testing.assert_close(
        losses.terms["at"], fastkd.attention_transfer_loss(stages, theirs, weight=1000.0)
    )
    torch.testing.assert_close(losses.terms["rkd"], fastkd.rkd_loss(final.mean((2, 3)), last.mean((2, 3))))
    torch.testing.assert_close(losses.terms["ce"], F.cross_entropy(student(images[0]), images[1]))
    assert (
        list(student.state_dict()) == state
        and [key.removeprefix("student.") for key in distillation.state_dict()] == state
    )
    losses.total.backward()
    assert student.stem[0].weight.grad.any() and distillation.student is student
    shown = distillation.views[0](images[0], features="both")[0]
    torch.testing.assert_close(shown.final, final)
    assert shown.preact.stages[2] is shown.stages[2] and shown.stem == ()
    assert not distillation.views[0].outputs.store.found  # nothing of a forward pass stays
    student(images[0])
    assert not distillation.views[0].outputs.store.found


def test_fsp_takes_consecutive_stages_without_a_stem():
    torch.manual_seed(2)
    student, teacher = Plain(5), Plain(5)
    images = batch()
    distillation = fastkd.Distillation(
        student, teacher, "fsp", student_points=POINTS, teacher_points=POINTS
    ).eval()
    stages = [by_hand(network, images[0])[0] for network in (student, teacher)]
    torch.testing.assert_close(distillation(*images).terms["fsp"], fastkd.fsp_loss(*stages))


def test_logits_and_vectors_need_no_names():
    student, teacher = pair()
    images = batch()
    for method in ("kd", "rkd+kd"):
        distillation = fastkd.Distillation(student, teacher, method).eval()
        torch.testing.assert_close(
            distillation(*images).terms["kd"],
            fastkd.kd_loss(
                student(images[0]), teacher(images[0]), weight=distillation.methods["kd"].function.weight
            ),
        )
    ours = fastkd.Distillation(create_model("resnet8", 7), teacher, "rkd")
    assert ours(*images).terms["rkd"].isfinite()
    gated = fastkd.Distillation(student, teacher, "kd", classifier="gate")
    assert gated.views[0](images[0])[0].pooled.shape == (4, 10)


def test_our_networks_may_be_named_too():
    student, teacher = create_model("resnet8", 7), create_model("resnet8", 7)
    images = batch()
    plain = fastkd.Distillation(student, teacher, "at", fold=False).eval()(*images)
    names = ["layer1", "layer2", "layer3"]
    named = fastkd.Distillation(student, teacher, "at", student_points=names, teacher_points=names).eval()(
        *images
    )
    torch.testing.assert_close(named.total, plain.total)


def test_it_is_one_graph_and_copies_belong_to_themselves():
    distillation = fastkd.Distillation(
        *pair(), "at+rkd", preset="repdistiller", student_points=POINTS, teacher_points=POINTS
    )
    images, results = batch(), []
    clone = copy.deepcopy(distillation)
    for module, forward in (
        (distillation, distillation),
        (clone, torch.compile(clone, fullgraph=True, backend="aot_eager")),
    ):
        for _ in range(2):
            module.zero_grad()
            losses = forward(*images)
            losses.total.backward()
        results.append([losses.terms, [p.grad for p in module.parameters() if p.grad is not None]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert clone.views[0].network is clone.student


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "student_points is None, but method 'at' reads maps of the student: name submodules"),
        ({"student_points": POINTS}, "teacher_points is None, but method 'at' reads maps of the teacher"),
        (
            {"student_points": ["stem", "body.tow"]},
            "student_points: student has no submodule 'body.tow', wanted one such as body.two",
        ),
        ({"classifier": "fc"}, "classifier: student has no submodule 'fc', wanted one such as "),
    ],
)
def test_what_is_not_named_or_not_there_is_told(options, words):
    with pytest.raises(ValueError, match=words):
        fastkd.Distillation(*pair(), "at", **options)


def test_a_classifier_may_be_named_for_one_network_or_for_each():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.extra = nn.Conv2d(3, 6, 3), nn.Linear(6, 7), nn.Linear(7, 7)

        def forward(self, x):
            return self.extra(self.head(self.body(x).mean((2, 3))))

    for classifier, widths in (
        (None, (7, 16)),
        ("extra", (7, 16)),
        (("head", None), (6, 16)),
        ("head", (6, 16)),
    ):
        distillation = fastkd.Distillation(Named(), Plain(8), "kd", classifier=classifier)
        views = distillation.views
        assert tuple(view(batch()[0])[0].pooled.shape[1] for view in views) == widths, classifier


def test_stages_of_other_shapes_and_numbers_are_told():
    student, teacher = pair()
    points = {"student_points": POINTS, "teacher_points": POINTS[:2]}
    with pytest.raises(ValueError, match="student has 3 stages, teacher has 2"):
        fastkd.Distillation(student, teacher, "at", **points)(batch()[0])
    for method in ("ofd", "reviewkd", "sakd"):
        with pytest.raises(ValueError, match="student has 3 stages, teacher has 2"):
            fastkd.Distillation(student, teacher, method, **points)
    with pytest.raises(
        ValueError, match="no batch norm is found before the ReLU of 'body.one'.*ofd.margin=batch"
    ):
        fastkd.Distillation(student, teacher, "ofd", student_points=POINTS, teacher_points=POINTS)
    options = {"ofd": {"margin": "batch"}}
    fastkd.Distillation(
        student, teacher, "ofd", options=options, student_points=POINTS, teacher_points=POINTS
    )


class Rounding(nn.Module):
    """As fake quantization does, it computes with numbers of fewer bits."""

    def __init__(self, rounds=True):
        super().__init__()
        self.rounds, self.head = rounds, nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x.to(torch.bfloat16).float() if self.rounds else x.to(torch.float64).float())


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_that_rounds_on_purpose_is_told_once_it_is_compiled(role, monkeypatch):
    """Inductor leaves the casts out, unless it is told not to."""
    from torch._inductor import config

    monkeypatch.setattr(errors, "_said", set())
    networks = {"student": Rounding(role == "student"), "teacher": Rounding(role == "teacher")}
    made = fastkd.Distillation(*networks.values(), "kd", image_shape=(3, 2, 2))
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # of PyTorch, there alone
        made(images, labels)  # eagerly nothing is lost
        with config.patch(emulate_precision_casts=True):
            torch.compile(made, fullgraph=True, backend="eager")(images, labels)
    torch.compiler.reset()
    told = (
        f"{role} Rounding rounds by a cast to bfloat16 and back, which inductor leaves out: before compiling,"
    )
    with pytest.warns(UserWarning, match=told):
        torch.compile(made, fullgraph=True, backend="eager")(images, labels)
    torch.compiler.reset()


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_what_a_method_has_changed_loads_into_the_same_distillation(method):
    """Of networks that are none of ours: the neck and the classifier have names of their own."""
    names = ["layer1", "layer2", "layer3"]
    first, second = (
        fastkd.Distillation(
            Foreign(), Foreign(), method, seed=seed, student_points=names, teacher_points=names
        ).eval()
        for seed in (0, 1)
    )
    with torch.no_grad():
        for parameter in first.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = batch()[0]
    assert not torch.equal(first.student(images), second.student(images))
    second.student.load_state_dict(first.student.state_dict())
    assert torch.equal(first.student(images), second.student(images))
