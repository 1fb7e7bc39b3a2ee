"""One student of several teachers, as a module and as a run."""

from __future__ import annotations

import json

import pytest
import torch
from record_files import interrupt, rows_of
from runs import bits, load
from support_data import QUICK

import fastkd
from fastkd.data.loader import Batches
from fastkd.models import create_model
from fastkd.training.phases import InOrder


def networks(*names, classes=4):
    torch.manual_seed(0)
    return [create_model(name, classes).eval() for name in names]


MEAN = (0.5,) * 3
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 2, 1])


def test_the_mean_of_the_losses_is_that_of_single_distillations(one_thread):
    student, *teachers = networks("resnet8", "resnet8", "wrn_16_1")
    made = fastkd.SeveralTeachers(student, teachers, "fitnet+kd", preset="repdistiller").eval()
    own = list(made.methods.parameters())
    assert len(own) == 2 * len([*made.methods[0].parameters()]) > 0
    assert {id(x) for x in made.parameters()} == {id(x) for x in [*student.parameters(), *own]}
    losses = made(IMAGES, LABELS)
    each = []
    for i, teacher in enumerate(teachers):
        single = fastkd.Distillation(student, teacher, "fitnet+kd", preset="repdistiller").eval()
        single.methods.load_state_dict(made.methods[i].state_dict())
        each.append(single(IMAGES, LABELS).terms)
    for name in ("ce", "fitnet", "kd"):
        wanted = torch.stack([terms[name] for terms in each]).mean()
        torch.testing.assert_close(losses.terms[name], wanted)
    assert each[0]["kd"] != each[1]["kd"]
    losses.total.backward()
    assert all(x.grad is not None for x in own)


def test_the_mean_of_the_logits_is_one_teacher(one_thread):
    student, *teachers = networks("resnet8", "resnet8", "resnet8x4", "wrn_16_1")
    made = fastkd.SeveralTeachers(student, teachers, "kd", join="logits", fold=False).eval()
    losses = made(IMAGES)
    mean = torch.stack([teacher(IMAGES) for teacher in teachers]).mean(0)
    torch.testing.assert_close(losses.terms["kd"], fastkd.kd_loss(student(IMAGES), mean, weight=0.9))
    torch.testing.assert_close(losses.teacher_logits, mean)
    made.train()
    assert student.training and not any(teacher.training for teacher in teachers)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(IMAGES).total, losses.total, rtol=1e-4, atol=1e-5)


def test_records_go_back_to_their_own_teacher():
    student, *teachers = networks("resnet8", "resnet8", "resnet8")
    given = {"train_labels": torch.arange(40) % 4, "options": {"crd": {"k": 5}}}
    made = fastkd.SeveralTeachers(student, teachers, "crd", **given).eval()
    index = torch.tensor([3, 9, 20, 31])
    singles = [fastkd.Distillation(student, teacher, "crd", **given).eval() for teacher in teachers]
    for single in (made, *singles):
        single.update(index, single(IMAGES, LABELS, index).records)
    for found, single in zip(made.methods, singles, strict=True):
        wanted = single.methods.state_dict()
        assert all(torch.equal(x, wanted[key]) for key, x in found.state_dict().items())
    banks = [single.methods["crd"].function.teacher_bank for single in singles]
    assert not torch.equal(*banks)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("simkd", {}, "method 'simkd' changes the student, so it can have one teacher only"),
        ("at+kd", {"join": "logits"}, "join is 'logits', but at reads more of a teacher than its logits"),
        ("kd", {"join": "both"}, "join is 'both', wanted one of losses, logits"),
        ("baseline", {}, "method 'baseline' has no teacher, but several are given"),
        ("dkd", {}, "option dkd.beta is left open, the teachers decide 2.0, 8.0: give it"),
    ],
)
def test_what_cannot_be_is_one_line(method, options, words):
    student, *teachers = networks("resnet8", "resnet8", "resnet8x4")
    with pytest.raises(ValueError, match=words):
        fastkd.SeveralTeachers(student, teachers, method, **options).settled()
    with pytest.raises(ValueError, match="teachers has 1 network, wanted at least two"):
        fastkd.SeveralTeachers(student, teachers[:1], "kd")
    for given, words in (
        (None, "teachers is NoneType, wanted a list of networks"),
        (torch.nn.Sequential(*teachers), "teachers is Sequential, wanted a list of networks"),
        ([teachers[0], "resnet8"], r"teachers\[1\] is str, wanted a torch.nn.Module"),
    ):
        with pytest.raises(TypeError, match=words):
            fastkd.SeveralTeachers(student, given, "kd")
    with pytest.raises(TypeError, match="method is 3, wanted a name, or what fastkd.methods.define returns"):
        fastkd.SeveralTeachers(student, teachers, 3)
    with pytest.raises(TypeError, match="train_images is a generator, which ends after the first teacher"):
        fastkd.SeveralTeachers(student, teachers, "kd", train_images=(x for x in [IMAGES]))
    other = networks("resnet8", classes=5)
    with pytest.raises(ValueError, match="classes"):
        fastkd.SeveralTeachers(student, [teachers[0], *other], "kd")


def test_a_run_of_two_teachers_says_so_and_goes_on(small_main, tmp_path, capsys):
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file, network in zip(files, networks("resnet8", "wrn_16_1", classes=10), strict=True):
        torch.save(network.state_dict(), file)
    two = ["--teacher", "resnet8", "--teacher", "wrn_16_1"]
    two += [word for file in files for word in ("--teacher-checkpoint", str(file))]
    quick = [word for word in QUICK if word != "--teacher"]
    quick.remove("resnet8")
    flags = ["--method", "at+kd", *quick, *two, "--epochs", "1", "--output", str(tmp_path / "runs")]
    assert small_main(flags) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "resnet8 + wrn_16_1" in said and "the mean of their losses" in said
    (row,) = rows_of(tmp_path / "runs")
    assert row["teacher"] == "resnet8 + wrn_16_1" and "join_teachers=losses" in row["overrides"]
    assert row["teacher_checkpoint"] == f"{files[0]} + {files[1]}"
    folder = tmp_path / "runs" / row["folder"]
    identity = json.loads((folder / "config.json").read_text())["identity"]
    assert identity["join_teachers"] == "losses" and identity["more_teachers"][0][0] == "wrn_16_1"
    command = (folder / "command.sh").read_text()
    assert command.count("--teacher-checkpoint") == 2 and "--join-teachers losses" in command
    assert small_main([*flags, "--resume", "auto"]) == 0 and "is finished" in capsys.readouterr().out
    # other weights of the second teacher are another run
    (other,) = networks("wrn_16_1", classes=10)
    torch.nn.init.zeros_(other.fc.weight)
    torch.save(other.state_dict(), files[1])
    assert small_main([*flags, "--resume"]) == 2
    assert "no unfinished run of this configuration" in capsys.readouterr().err
    for wrong, words in (
        ([*flags, "--teacher", "resnet8"], "--teacher is given 3 times, --teacher-checkpoint 2 times"),
        ([*flags, "--join-teachers", "logits"], "join is 'logits', but at reads more of a teacher"),
    ):
        assert small_main(wrong) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    single = ["--method", "kd", *QUICK, "--join-teachers", "logits", "--output", str(tmp_path / "runs")]
    assert small_main(single) == 2 and "there is one teacher" in capsys.readouterr().err


def test_each_teacher_of_a_run_sees_the_training_images(small_main, tmp_path, capsys):
    """OFD measures the maps of every teacher before the first step."""
    file = tmp_path / "a.pt"
    torch.save(networks("resnet8", classes=10)[0].state_dict(), file)
    flags = ["--method", "ofd", "--option", "ofd.margin=data", *QUICK, "--teacher", "resnet8"]
    flags += ["--teacher-checkpoint", str(file)] * 2
    assert small_main([*flags, "--epochs", "1", "--output", str(tmp_path / "runs")]) == 0, (
        capsys.readouterr().err
    )
    assert rows_of(tmp_path / "runs")[-1]["teacher"] == "resnet8 + resnet8"


def test_what_is_measured_are_all_training_images_each_time():
    batches = Batches(
        torch.zeros(10, 3, 32, 32, dtype=torch.uint8),
        torch.arange(10),
        MEAN,
        MEAN,
        batch_size=4,
        drop_last=True,
    )
    images = InOrder(batches)
    for _ in range(2):
        assert torch.cat([labels for _, labels in images]).tolist() == [*range(10)]
    assert batches.drop_last


def test_a_run_by_the_mean_of_the_logits_says_so_and_goes_on(small_main, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    teachers = networks("resnet8", "wrn_16_1", classes=10)
    for file, network in zip(files, teachers, strict=True):
        torch.save(network.state_dict(), file)
    flags = [word for word in QUICK if word not in ("--teacher", "--student", "resnet8")]
    flags += "--method kd --student resnet8 --teacher resnet8 --teacher wrn_16_1 --epochs 2".split()
    flags += [word for file in files for word in ("--teacher-checkpoint", str(file))]
    logits = [*flags, "--join-teachers", "logits"]
    taught = []
    whole = fastkd.SeveralTeachers.forward

    def forward(self, images, *arguments):
        losses = whole(self, images, *arguments)
        taught.append((images.detach().clone(), losses.teacher_logits.detach().clone()))
        return losses

    monkeypatch.setattr(fastkd.SeveralTeachers, "forward", forward)
    assert small_main([*logits, "--output", str(tmp_path / "whole")]) == 0, capsys.readouterr().err
    assert "the mean of their logits" in capsys.readouterr().out
    images, found = max(taught, key=lambda step: step[0].square().sum())  # not the blank ones of the plan
    with torch.no_grad():
        mean = torch.stack([teacher(images) for teacher in teachers]).mean(0)
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-3)
    (row,) = rows_of(tmp_path / "whole")
    assert row["teacher"] == "resnet8 + wrn_16_1" and "join_teachers=logits" in row["overrides"].split()
    mended = interrupt(monkeypatch, 2)
    assert small_main([*logits, "--output", str(tmp_path / "parted")]) == 130
    mended()
    capsys.readouterr()
    # the mean of the losses is another run
    assert small_main([*flags, "--output", str(tmp_path / "parted"), "--resume"]) == 2
    assert "join_teachers" in capsys.readouterr().err
    assert small_main([*logits, "--output", str(tmp_path / "parted"), "--resume"]) == 0
    assert "goes on after epoch 1 of 2" in capsys.readouterr().out
    (again,) = rows_of(tmp_path / "parted")
    assert [row[name] for name in ("acc", "losses", "overrides")] == [
        again[name] for name in ("acc", "losses", "overrides")
    ]
    saved = [
        load(tmp_path / name / one["folder"] / "last.pt") for name, one in (("whole", row), ("parted", again))
    ]
    for key in ("model", "method", "optimizer"):
        assert bits(saved[0][key]) == bits(saved[1][key]), key
