"""A teacher whose weights want other images than the data's: from the command line to the last picture."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch
from image_folders import NETWORKS, make_images
from record_files import rows_of
from run_cases import error_of
from support_data import QUICK

import fastkd
from fastkd import Distillation, evaluate
from fastkd.models import create_model
from fastkd.models.specs import declared_normalization
from fastkd.report import maps
from fastkd.training import Settings, attention_maps, config, networks
from fastkd.training.run_summary import describe
from fastkd.training.teacher_images import in_words, parsed, written

pytest.importorskip("PIL")
HALF = "0.5,0.5,0.5/0.5,0.5,0.5"
OWN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
FLAGS = "--method kd --dataset folder --data images --teacher nets.py:halved --student nets.py:student"
FLAGS = f"{FLAGS} --image-size 16 --epochs 1 --batch-size 6 --workers 0 --lr 0.01 --device cpu".split()


@pytest.fixture
def place(tmp_path, monkeypatch, one_thread):
    """A folder with a user's file, images and the teacher's weights alone, as another library saves them."""
    (tmp_path / "nets.py").write_text(NETWORKS)
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("nets.py:halved", 3).state_dict(), "weights.pt")
    torch.save(create_model("nets.py:teacher", 3).state_dict(), "plain.pt")
    return tmp_path


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(fastkd.__file__).parent.parent))
    import train

    return train.main


def planned(**given):
    settings = {"teacher": "nets.py:halved", "student": "nets.py:student", "image_size": 16, "workers": 0}
    overrides = {"batch_size": 6, "epochs": 1}
    return config.Config(
        Settings("kd", "folder", data="images", overrides=overrides, device="cpu", **{**settings, **given})
    )


def test_a_run_gives_the_teacher_the_images_that_its_weights_declare(main, place, monkeypatch, capsys):
    given, seen, drawn = ["--teacher-checkpoint", "weights.pt"], [], []
    whole, draw = Distillation.ask, attention_maps.stages

    def ask(self, images):
        answer = whole(self, images)
        if images.any():  # else a look at blank ones
            wanted = self.teacher((images * OWN[1] + OWN[0] - 0.5) / 0.5)
            torch.testing.assert_close(answer.logits, wanted, rtol=1e-4, atol=1e-4)
            seen.append(len(images))
        return answer

    def stages(model, batch, *rest):
        drawn.append(batch)
        return draw(model, batch, *rest)

    monkeypatch.setattr(Distillation, "ask", ask)
    monkeypatch.setattr(attention_maps, "stages", stages)
    assert main([*FLAGS, *given, "--dry-run"]) == 0 and seen
    assert main([*FLAGS, *given]) == 0
    said = " ".join(capsys.readouterr().out.split())
    half = (
        "the images of the teacher nets.py:halved are normalized by mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5"
    )
    assert said.count(f"{half}, as its weights declare, those of the student by mean 0.485") == 2
    (row,) = rows_of(place / "runs")
    assert f"teacher_normalization={HALF}" in row["overrides"]
    teacher = create_model("nets.py:halved", 3).eval()
    teacher.load_state_dict(torch.load("weights.pt"))
    images, labels = next(planned().batches("teacher", parsed(HALF))[1].test())
    accuracy = 100 * (teacher(images).argmax(1) == labels).double().mean()
    assert row["teacher_acc"] == f"{accuracy:.2f}"
    folder = place / "runs" / row["folder"]
    about = json.loads((folder / "config.json").read_text())
    assert about["identity"]["teacher_normalization"] == [HALF]
    words = shlex.split(about["command"])
    assert words[words.index("--teacher-normalization") + 1] == HALF
    if attention_maps.available():
        theirs, ours = drawn
        torch.testing.assert_close(theirs * 0.5 + 0.5, ours * OWN[1] + OWN[0])
        assert maps.main([str(folder)]) == 0
        assert torch.equal(drawn[2], theirs) and torch.equal(drawn[3], ours)
    # the same figures by the flag are the same run, the data's are another
    for flags in ([], ["--teacher-normalization", "0.5/0.5"]):
        assert main([*FLAGS, *given, *flags, "--resume", "auto"]) == 0
        assert "is finished" in capsys.readouterr().out
    assert main([*FLAGS, *given, "--teacher-normalization", "data", "--resume"]) == 2
    assert "no unfinished run of this configuration" in capsys.readouterr().err


def test_what_trained_the_weights_is_asked_before_what_a_package_declares(place):
    assert planned().teacher_normalizations == [None]  # the run trains its teacher
    assert planned(teacher_checkpoint="weights.pt").teacher_normalizations == [parsed(HALF)]
    refused = planned(teacher_checkpoint="weights.pt", teacher_normalization=("data",))
    assert refused.teacher_normalizations == [None]
    assert refused.words_of_teachers() == {"teacher_normalization": ["data"]}
    assert "teacher_normalization" not in refused.identity("student")
    # a run of ours, which normalizes as the data's are, whatever the network declares
    state = {"model": torch.load("weights.pt")}
    ofd = tuple(x / 255 for x in (125.3, 123.0, 113.9)), tuple(x / 255 for x in (63.0, 62.1, 66.7))
    own, kept = ((0.4, 0.5, 0.6), (0.25, 0.2, 0.3)), {"images_normalized": "0.4,0.5,0.6/0.25,0.2,0.3"}
    folders = {"images_normalized": "0.485,0.456,0.406/0.229,0.224,0.225"}
    for rest, normalization, dataset, wanted, told in (
        ({}, "own", "folder", None, False),
        ({}, "ofd", "cifar10", ofd, False),
        ({}, "own", "cifar10", None, True),  # of an older version: the figures are nowhere
        (kept, "own", "cifar10", own, False),
        (kept, "own", "folder", own, False),
        (folders, "own", "cifar10", None, False),  # the same as this run's
        ({"images_normalized": "0.4"}, "own", "folder", None, False),
    ):
        about = {"identity": {"normalization": normalization, "dataset": dataset}, **rest}
        torch.save({**state, "config": about}, "recorded.pt")
        plan = planned(teacher_checkpoint="recorded.pt")
        (found,) = plan.teacher_normalizations
        assert found == wanted
        screen = describe(plan)
        assert ("was trained on cifar10, and recorded.pt does not say how" in screen) == told
        assert ("as in the run that trained it" in screen) == (wanted is not None)
    plan = planned(teacher_checkpoint="plain.pt", teacher="nets.py:teacher")
    assert plan.teacher_normalizations == [None] and plan.words_of_teachers() == {}


def test_figures_of_another_data_set_come_with_its_teacher(small_main, tmp_path, monkeypatch):
    from fastkd.data import digits

    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images", classes=[f"class{i}" for i in range(10)], train=1, test=1)
    assert small_main(["--method", "baseline", *QUICK, "--epochs", "1", "--output", "trained"]) == 0
    (trained,) = tmp_path.glob("trained/*/best.pt")
    theirs = digits.load()
    plan = planned(teacher="resnet8", student="resnet8", teacher_checkpoint=trained)
    (found,) = plan.teacher_normalizations
    assert found == (theirs.mean, theirs.std) != plan.normalization()
    tested = evaluate.test(trained, dataset="folder", data="images", image_size=32, device="cpu")
    assert tested.normalized == in_words(found)


def test_torchvision_declares_it_too(place, torchvision):
    assert declared_normalization(None, "torchvision:efficientnet_v2_l") == ((0.5,) * 3, (0.5,) * 3)
    mean, std = declared_normalization(None, "torchvision:resnet34")
    torch.testing.assert_close((torch.tensor(mean), torch.tensor(std)), tuple(x.flatten() for x in OWN))
    assert (
        torchvision.models.get_model_weights("resnet34")
        and declared_normalization(None, "torchvision:none") is None
    )


def test_torchvisions_other_weights_are_known_by_their_file(place, torchvision, monkeypatch):
    """By its SHA-256, in which the published name ends; the weights themselves are not fetched here."""
    vgg = torchvision.models.vgg
    (place / "mine.pth").write_bytes(b"features")
    digest, spec = hashlib.sha256(b"features").hexdigest(), "torchvision:vgg16"
    usual = declared_normalization(None, spec)
    assert usual[0] == (0.485, 0.456, 0.406)
    for file in (place / "mine.pth", place / "nowhere.pth"):  # of none of them
        assert declared_normalization(None, spec, file) == usual
    url = f"https://download.pytorch.org/models/vgg16_features-amdegroot-{digest[:8]}.pth"
    features = vgg.VGG16_Weights.IMAGENET1K_FEATURES
    monkeypatch.setattr(features, "_value_", dataclasses.replace(features.value, url=url))
    wanted = (0.48235, 0.45882, 0.40784), (1 / 255,) * 3
    assert declared_normalization(None, spec, place / "mine.pth") == wanted
    asked, file = [], place / "weights.pt"
    monkeypatch.setattr(networks, "declared_normalization", lambda _, *rest: asked.append(rest))
    planned(teacher_checkpoint=file)
    assert asked == [("nets.py:student", None), ("nets.py:halved", file)]


def test_each_of_several_teachers_has_its_own_images_and_points(main, place, monkeypatch, capsys):
    flags = [word for word in FLAGS if word not in ("--teacher", "nets.py:halved", "kd", "--method")]
    flags += "--method at --teacher nets.py:teacher --teacher nets.py:halved --no-pictures".split()
    flags += "--teacher-checkpoint plain.pt --teacher-checkpoint weights.pt --student-points layer1".split()
    points = "--teacher-points layer1 --teacher-points layer2".split()
    assert main([*flags, *points, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "teacher: layer1 8×8×8" in said and "teacher: layer2 8×4×4" in said
    assert main([*flags, *points]) == 0
    (row,) = rows_of(place / "runs")
    folder = place / "runs" / row["folder"]
    about = json.loads((folder / "config.json").read_text())
    assert about["identity"]["more_points"] == [["layer2"]]
    assert about["identity"]["teacher_normalization"] == ["data", HALF]
    words = shlex.split(about["command"])
    assert words[words.index("--teacher-points") :][:4] == points
    assert words[words.index("--teacher-normalization") :][1:4:2] == ["data", HALF]
    assert "teacher_points=layer1+layer2" in row["overrides"]
    assert main([*words[words.index("--method") :], "--resume", "auto"]) == 0
    assert "is finished" in capsys.readouterr().out
    for wrong, words in (
        (
            [*points, "--teacher-points", "layer1"],
            "--teacher-points is given 3 times, and there are 2 teachers",
        ),
        (
            ["--teacher-normalization", "0.5/0.5"] * 3,
            "--teacher-normalization is given 3 times, and there are 2",
        ),
        (["--teacher-points", "layer1", "--teacher-points", "nowhere"], "no submodule 'nowhere'"),
    ):
        assert words in error_of(main, capsys, [*flags, *wrong])
    with pytest.raises(SystemExit):
        main([*flags, "--teacher-normalization", "0.5/0"])
    assert "'0.5/0', wanted data, or MEAN/STD of each channel" in capsys.readouterr().err
    assert main([*FLAGS, "--teacher-normalization", "0.5/0.5"]) == 2  # without a checkpoint
    assert "a teacher that the run trains gets the images as they are" in capsys.readouterr().err


def test_a_loop_of_your_own_gives_each_teacher_its_own(one_thread):
    student, *teachers = (create_model("resnet8") for _ in range(3))
    own, half = ((0.4,) * 3, (0.2,) * 3), ((0.5,) * 3, (0.5,) * 3)
    given = {"normalization": own, "teacher_normalization": [own, half]}
    made = fastkd.SeveralTeachers(student, teachers, "kd", fold=False, **given).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = torch.stack([teachers[0](images), teachers[1]((images * 0.2 - 0.1) / 0.5)]).mean(0)
    torch.testing.assert_close(made(images).teacher_logits, wanted, rtol=1e-4, atol=1e-5)
    both = fastkd.SeveralTeachers(student, teachers, "kd", normalization=own, teacher_normalization=half)
    assert all(part._frozen[0].scale is not None for part in both.parts)
    points = {"student_points": ["layer1"], "teacher_points": [["layer2"], None]}
    made = fastkd.SeveralTeachers(student, teachers, "kd", **points)
    assert [part.views[1] is None for part in made.parts] == [False, True]
    with pytest.raises(ValueError, match="teacher_points has 3 values, and there are 2 teachers"):
        fastkd.SeveralTeachers(student, teachers, "kd", teacher_points=[["layer2"]] * 3)


@pytest.mark.parametrize("text", ["data", HALF, "0.1,0.2,0.3/1.0,2.0,3.0"])
def test_the_flag_reads_what_it_writes(text):
    assert written(parsed(text)) == text


@pytest.mark.parametrize("text", ["", "0.5", "0.5/0.5/0.5", "a/b", "0.5,0.5/0.5", "nan/0.5", "0.5/-1"])
def test_another_normalization_is_one_line(text):
    with pytest.raises(ValueError, match="wanted data, or MEAN/STD of each channel"):
        parsed(text)


def test_a_method_that_looks_at_the_teacher_first_sees_its_images(one_thread):
    """OFD's margins are the teacher's means over the training images, normalized as it wants them."""
    student, teacher = create_model("resnet8"), create_model("resnet8").eval()
    own, half = ((0.4,) * 3, (0.2,) * 3), ((0.5,) * 3, (0.5,) * 3)
    images = torch.randn(4, 3, 32, 32)
    rest = {"options": {"ofd": {"margin": "data"}}, "fold": False}
    given = {"normalization": own, "teacher_normalization": half}
    made = fastkd.Distillation(student, teacher, "ofd", train_images=[images], **rest, **given)
    other = fastkd.Distillation(student, teacher, "ofd", train_images=[(images * 0.2 - 0.1) / 0.5], **rest)
    margins = [dict(each.methods.named_buffers()) for each in (made, other)]
    names = [name for name in margins[0] if "margin" in name]
    assert names
    for name in names:
        torch.testing.assert_close(margins[0][name], margins[1][name], rtol=1e-3, atol=1e-5)


def test_bare_weights_are_tested_on_images_as_declared_or_as_asked(place, capsys):
    bare = ["weights.pt", "--model", "nets.py:halved", "--dataset", "folder", "--data", "images"]
    bare += ["--image-size", "16", "--device", "cpu"]
    half = "; images normalized by mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5\n"
    for flags, wanted in (
        ([], half),
        (["--normalization", "own"], "images/s\n"),
        (["--normalization", "0.5/0.5"], half),
    ):
        assert evaluate.main([*bare, *flags]) == 0
        assert capsys.readouterr().out.endswith(wanted)
    for wrong, words in (("0.5/0", "wanted MEAN/STD"), ("ofd", "has no constants for folder: wanted own")):
        assert evaluate.main([*bare, "--normalization", wrong]) == 2
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1
