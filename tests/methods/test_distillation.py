"""Student, teacher and method as one module, whatever the method owns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from distillation_cases import batch, distillation_of, networks
from toy_methods import define

import fastkd
from fastkd.methods import Points


def test_a_loop_of_ones_own_learns():
    torch.manual_seed(0)
    distillation, (images, labels, _) = distillation_of("at+kd"), batch(6)
    optimizer = torch.optim.SGD(distillation.parameters(), 0.02)
    totals = []
    for epoch in range(8):
        distillation.train()
        distillation.set_epoch(epoch, 8)
        optimizer.zero_grad()
        losses = distillation(images, labels)
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
        assert list(losses.terms) == ["ce", "at", "kd"] and losses.records == {}
        torch.testing.assert_close(losses.total, sum(losses.terms.values()))
    assert totals[-1] < 0.8 * totals[0]
    without = distillation(images)
    assert list(without.terms) == [
        "at",
        "kd",
    ] and without.student_logits.shape == without.teacher_logits.shape == (6, 7)


@pytest.mark.parametrize("name", ["toy", "wrapping"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teacher_is_outside_and_moves_along(name, mode):
    student, teacher = networks()
    distillation = distillation_of(name, (student, teacher), teacher_mode=mode)
    inside = {id(p) for p in distillation.parameters()} | {id(b) for b in distillation.buffers()}
    assert not inside & {id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())}
    assert teacher not in set(distillation.modules()) and not any(
        "teacher" in key for key in distillation.state_dict()
    )
    assert not any(p.requires_grad for p in teacher.parameters()) and distillation.teacher is teacher
    names = [key for key, _ in distillation.named_parameters()]
    assert names[: len(list(student.parameters()))] == [
        f"student.{key}" for key, _ in student.named_parameters()
    ]
    images, labels, index = batch()
    before = distillation(images, labels, index).teacher_logits
    moved = distillation.double()(images.double(), labels, index).teacher_logits
    assert moved.dtype == torch.float64 == next(teacher.parameters()).dtype
    torch.testing.assert_close(moved.float(), before, rtol=1e-3, atol=1e-3)
    clone = copy.deepcopy(distillation)
    assert clone.teacher is not teacher
    torch.testing.assert_close(clone(images.double(), labels, index).teacher_logits, moved)


def test_cross_entropy_of_a_float64_student_is_in_float64():
    distillation = fastkd.Distillation(*networks(), "kd").double()
    images, labels, _ = batch()
    losses = distillation(images.double(), labels)
    want = F.cross_entropy(losses.student_logits, labels) * 0.1
    assert losses.terms["ce"].dtype == losses.total.dtype == torch.float64
    torch.testing.assert_close(losses.terms["ce"], want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", sorted({*fastkd.methods.METHODS} - {"baseline"}))
def test_a_module_in_half_precision_learns_as_in_float32(name):
    distillation, (images, labels, index) = distillation_of(name), batch()
    want = copy.deepcopy(distillation)(images, labels, index).total
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(distillation).to(dtype)
        total = half(images.to(dtype), labels, index).total
        torch.testing.assert_close(total, want, rtol=0.1, atol=0)
        total.backward()
        found = [p.grad for p in half.parameters() if p.grad is not None]
        assert all(grad.dtype == dtype and grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("name", ["kd", "at", "crd"])
def test_shapes_are_found_on_the_meta_device(name):
    distillation = distillation_of(name).to("meta")
    losses = distillation(*(x.to("meta") for x in batch()))
    losses.total.backward()
    assert losses.total.is_meta and losses.student_logits.shape == (4, 7)


def test_what_is_built_changes_neither_modes_nor_statistics_nor_random_numbers():
    student, teacher = networks()
    student.layer2[0].bn1.eval()
    buffers = [b.clone() for net in (student, teacher) for b in net.buffers()]
    state = torch.get_rng_state()
    first = [p.clone() for p in student.parameters()]
    distillation_of("toy", (student, teacher)).check()
    assert all(map(torch.equal, buffers, [*student.buffers(), *teacher.buffers()])) and torch.equal(
        state, torch.get_rng_state()
    )
    assert all(map(torch.equal, first, student.parameters()))


def test_modes_follow_the_module():
    for mode in ("eval", "train"):
        distillation = distillation_of("toy", teacher_mode=mode)
        for training in (True, False, True):
            distillation.train(training)
            assert distillation.student.training == distillation.methods["toy"].training == training
            assert distillation.teacher.training == (training and mode == "train")
    with pytest.raises(ValueError, match="teacher_mode is 'on', wanted 'eval' or 'train'"):
        distillation_of("toy", teacher_mode="on")


def test_a_folded_teacher_answers_as_the_teacher_and_is_folded_anew():
    student, teacher = networks()
    images = batch()[0]
    distillation, plain = (
        distillation_of("at", (student, teacher)),
        distillation_of("at", (student, teacher), fold=False),
    )
    for _ in range(2):
        torch.testing.assert_close(
            distillation(images).teacher_logits, teacher.eval()(images), rtol=1e-4, atol=1e-4
        )
        with torch.no_grad():
            teacher.fc.bias += 1
        distillation.fold()
    assert torch.equal(plain(images).teacher_logits, teacher(images))


def test_a_wrapped_student_is_trained_and_seen_by_the_others():
    student, teacher = networks("resnet8", "wrn_16_2")
    bare, classifier = list(student.state_dict()), teacher.fc.weight.clone()
    distillation = distillation_of("wrapping+toy", (student, teacher))
    assert (
        distillation.student is student
        and not student.fc.weight.requires_grad
        and torch.equal(student.fc.weight, classifier)
    )
    assert set(student.state_dict()) - set(bare) == {"neck.conv.weight", "neck.conv.bias"}
    # the projected width, not the student's own 64
    assert distillation.methods["toy"].layers[0].in_features == 128
    assert list(distillation.names) == ["ce", "toy", "wrapping", "kd"]
    losses = distillation(*batch())
    losses.total.backward()
    assert student.neck.conv.weight.grad is not None and student(batch()[0]).shape == (4, 7)


def test_logits_are_changed_for_every_loss_of_the_sum():
    student, teacher = networks()
    distillation = distillation_of("normed+kd", (student.eval(), teacher.eval()), fold=False).eval()
    images, labels, _ = batch()
    losses = distillation(images, labels)
    s, t = 3 * student(images), 3 * teacher(images)
    torch.testing.assert_close(losses.terms["ce"], F.cross_entropy(s, labels))
    torch.testing.assert_close(losses.terms["kd"], fastkd.kd_loss(s, t))
    torch.testing.assert_close([losses.student_logits, losses.teacher_logits], [s, t])


def test_a_schedule_is_a_factor_and_one_until_it_is_set():
    distillation = distillation_of("scheduled").eval()
    images = batch()[0]
    whole = distillation(images).terms["scheduled"]
    for epoch in (0, 1, 3):
        distillation.set_epoch(epoch, 4)
        torch.testing.assert_close(distillation(images).terms["scheduled"], whole * epoch / 4)
    assert "weights" not in distillation.state_dict()


def test_records_come_back_after_the_step():
    distillation = distillation_of("bank")
    images, labels, index = batch()
    losses = distillation(images, labels, index)
    record = losses.records["bank"]
    assert not record.requires_grad
    bank = distillation.methods["bank"].bank
    assert not bank.any()
    distillation.set_epoch(2, 5)
    torch.testing.assert_close(
        distillation(images, labels, index).terms["bank"], (record - 2).square().mean()
    )
    distillation.update(index, losses.records)
    assert (
        torch.equal(bank[index], record)
        and not bank[[2, 4, 6, 7]].any()
        and "methods.bank.bank" in distillation.state_dict()
    )
    with pytest.raises(ValueError, match="train_labels is None"):
        distillation_of("bank", train_labels=None)


@pytest.mark.parametrize("how", ["given", "around"])
def test_convolutions_run_under_autocast_and_losses_do_not(how):
    bf16 = torch.autocast("cpu", torch.bfloat16)
    distillation = distillation_of("scheduled", autocast=bf16 if how == "given" else None)
    images, labels, _ = batch()
    if how == "given":
        losses = distillation(images, labels)
        assert (
            distillation._frozen[0].answering.conv1.weight.dtype == torch.bfloat16
            and distillation.teacher.conv1.weight.dtype == torch.float32
        )
    else:
        with bf16:
            losses = distillation(images, labels)
    assert distillation.methods["scheduled"].seen == (torch.bfloat16, False)
    assert losses.total.dtype == losses.student_logits.dtype == losses.teacher_logits.dtype == torch.float32


def test_points_are_the_union_and_each_is_where_it_is_looked_for():
    images, model = batch()[0], networks()[0].eval()
    for points in (Points.NONE, Points.MAPS, Points.PREACT, Points.MAPS | Points.PREACT):
        features = points.observe(model, images).features
        assert (
            bool(features.stages)
            == bool(features.blocks)
            == (Points.MAPS in points and points != Points.NONE)
        )
        assert (features.preact is not None) == (Points.PREACT in points and points != Points.NONE)
        assert features.pooled.shape == (4, 64) and features.final.shape == (4, 64, 8, 8)
    assert distillation_of("at+scheduled").points == [Points.MAPS, Points.MAPS | Points.PREACT]


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match="teacher is None, wanted a network: method 'at' learns from one"):
        fastkd.Distillation(networks()[0], None, "at")
    with pytest.raises(
        ValueError, match="labels is None, wanted .N,. int64: method 'baseline' has no loss but cross-entropy"
    ):
        fastkd.Distillation(networks()[0], None, "baseline")(batch()[0])
    with pytest.raises(ValueError, match="channels"):
        distillation_of("fsp", networks("resnet8", "resnet8x4")).check()
    assert {name: len(calls) for name, calls in distillation_of("at+kd").check().items()} == {
        "at": 1,
        "kd": 0,
    }


def test_a_term_may_end_before_the_others():
    """Of scheduled, whose weight grows with the epoch, and kd: each at its own end."""
    definition = define("scheduled+kd", words=["ce.weight=1", "kd.until=2", "scheduled.until=3"])
    assert definition.changes["kd.until"] == 2 and definition.changes["scheduled.until"] == 3
    student, teacher = networks()
    distillation = fastkd.Distillation(student, teacher, definition).eval()
    images = batch()[0]
    whole = distillation(images).terms
    for epoch in range(4):
        distillation.set_epoch(epoch, 4)
        terms = distillation(images).terms
        torch.testing.assert_close(terms["kd"], whole["kd"] * (epoch < 2))
        torch.testing.assert_close(terms["scheduled"], whole["scheduled"] * (epoch / 4 if epoch < 3 else 0))
    known = fastkd.methods.define("at+kd", options={"at": {"until": 5}})
    assert known.terms[0].until == 5 and known.changes == {"at.until": 5}
    for value, words in (
        (0, "option at.until is 0, wanted at least 1"),
        ("x", "option at.until is 'x', wanted a whole"),
    ):
        with pytest.raises(ValueError, match=words):
            fastkd.methods.define("at", options={"at": {"until": value}})


def test_a_teacher_gets_images_as_it_was_trained_on():
    student, teacher = networks()
    images = batch()[0]
    own, theirs = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.4))
    plain = fastkd.Distillation(student, teacher, "at+kd", fold=False).eval()
    norms = {"normalization": own, "teacher_normalization": theirs}
    distillation = fastkd.Distillation(student, teacher, "at+kd", fold=False, **norms).eval()
    mean, std, other_mean, other_std = (torch.tensor(x).view(-1, 1, 1) for x in (*own, *theirs))
    losses = distillation(images)
    wanted = teacher((images * std + mean - other_mean) / other_std)
    torch.testing.assert_close(losses.teacher_logits, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(losses.student_logits, plain(images).student_logits)
    assert not [name for name in distillation.state_dict() if "teacher" in name]
    same = fastkd.Distillation(
        student, teacher, "at", normalization=own, teacher_normalization=own, fold=False
    )
    assert same._frozen[0].scale is None and torch.equal(same.eval()(images).teacher_logits, teacher(images))
    for name, other in (
        ("normalization", "teacher_normalization"),
        ("teacher_normalization", "normalization"),
    ):
        with pytest.raises(ValueError, match=f"^{other} is None and {name} is given, wanted both"):
            fastkd.Distillation(student, teacher, "at", **{name: own})
