"""Every method between networks that fastkd has never heard of."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_networks import Foreign
from torch import nn

import fastkd
from fastkd import errors
from fastkd.methods import METHODS
from fastkd.models import create_model

POINTS = ["layer1", "layer2", "layer3"]
WIDE = (32, 32, 64, 128)


def both(role):
    """The same network, one of ours and as anybody writes it."""
    torch.manual_seed({"student": 3, "teacher": 4}[role])
    ours, foreign = create_model("resnet8", 7), Foreign()
    foreign.load_state_dict(ours.state_dict())
    return ours, foreign


def distillation_of(method, networks, points=POINTS, **options):
    named = {"student_points": points, "teacher_points": points} if points else {}
    options = {"train_labels": torch.arange(9) % 7, "batch_size": 4, "epochs": 10, "fold": False, **options}
    return fastkd.Distillation(*networks, method, **named, **options)


def batch(n=4):
    return torch.randn(n, 3, 32, 32), torch.arange(n) % 7, torch.tensor([5, 0, 3, 8])[:n]


@pytest.mark.parametrize("method", [*METHODS[1:], "at+kd"])
def test_a_method_says_of_any_network_what_it_says_of_ours(method):
    """resnet8 has one block a stage, so that its stages are its blocks; FSP has a pair with the stem."""
    networks = [both("student"), both("teacher")]
    images, labels, index = batch()
    points = ["relu", *POINTS] if method == "fsp" else POINTS
    ours = distillation_of(method, [pair[0] for pair in networks], None).eval()
    foreign = distillation_of(method, [pair[1] for pair in networks], points).eval()
    assert [p.shape for p in foreign.methods.parameters()] == [p.shape for p in ours.methods.parameters()]
    found = []
    for distillation in (ours, foreign):
        losses = distillation(images, labels, index)
        losses.total.backward()
        gradients = {name: p.grad for name, p in distillation.named_parameters() if p.grad is not None}
        found.append([losses.terms, gradients, losses.student_logits])
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-4)
    assert list(foreign.state_dict()) and sorted(foreign.state_dict()) == sorted(ours.state_dict())


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_student_comes_out_as_it_went_in(method):
    torch.manual_seed(0)
    student, teacher = Foreign(), Foreign(widths=WIDE if method != "fsp" else (16, 16, 32, 64))
    student.layer1.eval()
    names, modes = list(student.state_dict()), {m: m.training for m in student.modules()}
    numbers = copy.deepcopy(student.state_dict())
    distillation = distillation_of(method, (student, teacher))
    added = {"simkd": {"neck"}, "norm": {"neck"}}.get(method, set())
    assert (
        distillation.student is student
        and {k.split(".")[0] for k in {*student.state_dict()} - {*names}} == added
    )
    assert all(m.training == modes.get(m, True) for m in student.modules())
    kept = [name for name in names if not (method == "simkd" and name.startswith("fc."))]
    assert all(torch.equal(student.state_dict()[name], numbers[name]) for name in kept)
    prefixes = {key.split(".")[0] for key in distillation.state_dict()}
    assert prefixes <= {"student", "methods"} and teacher not in set(distillation.modules())
    images, labels, index = batch()
    losses = distillation(images, labels, index)
    losses.total.backward()
    distillation.update(index, losses.records)
    if method != "kd":
        assert student.conv1.weight.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training
    clone = copy.deepcopy(distillation.eval())
    torch.testing.assert_close(clone(images, labels, index).terms, distillation(images, labels, index).terms)


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_a_student_that_was_changed_is_loaded_into_the_same_distillation(method, tmp_path):
    """Elsewhere, by networks of other weights; a bare network has no place for what was added."""

    def made(seed):
        torch.manual_seed(seed)
        return distillation_of(method, (Foreign(), Foreign(widths=WIDE)))

    trained = made(0)
    optimizer = torch.optim.SGD(trained.parameters(), 0.05)
    for _ in range(2):
        images, labels, index = batch()
        trained.train()(images, labels, index).total.backward()
        optimizer.step()
    torch.save(trained.student.state_dict(), tmp_path / "student.pt")
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    other, images = made(1), batch()[0]
    answers = [each.student.eval()(images) for each in (trained, other)]
    assert not torch.allclose(*answers)
    other.student.load_state_dict(saved)
    assert torch.equal(other.student(images), answers[0])
    with pytest.raises(RuntimeError, match="neck"):
        Foreign().load_state_dict(saved)


def test_a_relu_that_all_stages_share_tells_no_maps_before_it():
    """Its last call is not the stage's: the stage itself stands in, and no norm before it is found."""
    torch.manual_seed(0)
    student, teacher = Foreign(), Foreign()
    shared = nn.ReLU()
    for name in POINTS:
        getattr(teacher, name)[0].relu = shared
    distillation = distillation_of("reviewkd", (student, teacher)).eval()
    features, _ = distillation.views[1](batch()[0], features="both")
    assert all(map(torch.equal, features.preact.stages[:2], features.stages[:2]))
    assert features.preact.stages[2].min() < 0 and torch.equal(
        features.preact.stages[2].relu(), features.stages[2]
    )
    with pytest.raises(ValueError, match="no batch norm is found before the ReLU of 'layer1'"):
        distillation_of("ofd", (student, teacher))


@pytest.mark.parametrize("method", ["simkd", "norm"])
def test_a_step_is_one_graph(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    distillation = distillation_of(method, (Foreign(), Foreign()))
    compiled = torch.compile(copy.deepcopy(distillation), fullgraph=True, backend="aot_eager")
    images, labels, index = batch()
    results = []
    for module, forward in ((distillation, distillation), (compiled._orig_mod, compiled)):
        losses = forward(images, labels, index)
        losses.total.backward()
        results.append([losses, [p.grad for p in module.parameters() if p.grad is not None]])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("method", "said"), [("at", True), ("kd", False)])  # which reads no stages
def test_points_in_another_order_are_told_once(method, said, recwarn):
    errors._said.clear()
    student, teacher = (create_model("resnet8") for _ in range(2))
    given = {"student_points": ["layer2", "layer1"], "teacher_points": ["layer1", "layer2"]}
    for _ in range(2):
        made = fastkd.Distillation(student, teacher, method, **given)
    told = [str(warning.message) for warning in recwarn if "points" in str(warning.message)]
    text = "student_points are layer2, layer1, and student ResNet runs them as layer1, layer2"
    assert [each.partition(":")[0] for each in told] == [text] * said and made.notes == told
