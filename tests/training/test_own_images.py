"""The command with a user's networks and a folder of images, from the first screen to the last picture."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import time

import pytest
import torch
from image_folders import NETWORKS, cut_short, make_images
from record_files import interrupt
from run_cases import error_of, rows_of
from runs import bits, load

from fastkd import Distillation, evaluate
from fastkd.data import files
from fastkd.models import load_student
from fastkd.report import maps
from fastkd.training import Settings, Trainer, config
from fastkd.training import trainer as loops
from fastkd.training.step import TrainStep

pytest.importorskip("PIL")
FLAGS = "--dataset folder --data images --teacher nets.py:teacher --student nets.py:student --image-size 16"
FLAGS = f"{FLAGS} --teacher-size 24 --epochs 2 --batch-size 6 --lr 0.01 --device cpu".split()


def column(folder, name):
    with open(folder / "epochs.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a user's file and images, in which one run was made: AT and CRD, two workers."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "nets.py").write_text(NETWORKS)
    make_images(folder / "images")
    return folder


@pytest.fixture
def main(monkeypatch, place, one_thread):
    monkeypatch.syspath_prepend(str(loops.__file__.rpartition("/fastkd/")[0]))
    monkeypatch.chdir(place)
    import train

    return train.main


@pytest.fixture
def ran(main, place, capsys):
    """(the output folder of that run, what it printed)."""
    if not (place / "runs").exists():
        assert main(["--method", "at+crd", *FLAGS, "--workers", "2", "--output", "runs"]) == 0
        (place / "said").write_text(capsys.readouterr().out)
    return place / "runs", (place / "said").read_text()


def test_a_run_trains_teacher_and_student_and_records_them(ran):
    output, said = ran
    screen = said[: said.index("teacher: ")]
    assert max(map(len, screen.splitlines())) <= 100 and "\r" not in said
    shown = " ".join(screen.split())
    assert "student layer1, layer2; teacher layer1, layer2" in shown
    assert (
        "folder:images (images), 18 training and 6 test images of 3 classes, 16×16 for the student" in shown
    )
    assert "24×24 for the teacher, read by 2 workers; a bad image: stop" in shown and "pad_mode" not in shown
    teacher, student = rows_of(output)
    assert (teacher["dataset"], student["dataset"], student["recipe"]) == (*["folder:images"] * 2, "imagenet")
    assert (teacher["student"], student["teacher"]) == ("nets.py:teacher", "nets.py:teacher")
    assert "image_size=16 teacher_size=24" in student["overrides"]
    folder = output / student["folder"]
    names = {path.name for path in folder.iterdir()}
    assert {"best.pt", "last.pt", "epochs.csv", "log.txt", "command.sh"} <= names
    assert min(column(folder, "crd") + column(folder, "at")) > 0
    command = shlex.split(json.loads((folder / "config.json").read_text())["command"])
    for flag, value in (("--teacher", "nets.py:teacher"), ("--teacher-size", "24"), ("--workers", "2")):
        assert command[command.index(flag) + 1] == value
    saved = [path.name for path in (output / "teachers").glob("*.pt")]
    assert len(saved) == 1 and "nets.py-teacher" in saved[0] and "image_size=24" in saved[0]


def test_its_student_is_loaded_tested_and_drawn_again(ran, monkeypatch, capsys):
    output, _ = ran
    row = rows_of(output)[1]
    folder = output / row["folder"]
    student = load_student(folder)
    assert type(student).__name__ == "Small" and student(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    found = evaluate.test(folder, data="images")
    assert (f"{found.accuracy:.2f}", found.images) == (row["acc"], 6)
    pytest.importorskip("matplotlib")
    sheet = folder / "maps-plain-sum.png"
    before = sheet.read_bytes()
    assert before.startswith(b"\x89PNG")
    sheet.unlink()
    assert maps.main([str(folder)]) == 0 and sheet.name in capsys.readouterr().out
    assert sheet.read_bytes() == before


def test_simkds_student_is_loaded_with_what_was_put_into_it(ran, main, tmp_path):
    teacher = str(*(ran[0] / "teachers").glob("*.pt"))
    flags = ["--method", "simkd", *FLAGS, "--epochs", "1", "--workers", "0", "--no-pictures"]
    flags += ["--student-points", "layer1,layer2"]
    assert main([*flags, "--teacher-checkpoint", teacher, "--output", str(tmp_path)]) == 0
    folder = next(tmp_path.glob("simkd-*"))
    assert "teacher_size=24 student_points=layer1,layer2" in rows_of(tmp_path)[0]["overrides"]
    student = load_student(folder)
    assert torch.equal(student.head.weight, load(teacher)["model"]["head.weight"])
    assert (
        student(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
        and evaluate.test(folder, data="images").images == 6
    )


def test_the_teacher_gets_the_size_that_is_its_own(ran, main, monkeypatch, tmp_path):
    teacher, seen = str(*(ran[0] / "teachers").glob("*.pt")), set()
    whole = Distillation.forward

    def forward(self, images, labels, index, teacher_images):
        losses = whole(self, images, labels, index, teacher_images)
        with torch.no_grad():
            assert torch.equal(losses.teacher_logits, self.teacher(teacher_images))
        seen.add((images.shape[2:], teacher_images.shape[2:]))
        return losses

    monkeypatch.setattr(Distillation, "forward", forward)
    flags = ["--method", "kd", *FLAGS, "--epochs", "1", "--workers", "0", "--no-pictures"]
    assert main([*flags, "--teacher-checkpoint", teacher, "--output", str(tmp_path)]) == 0
    assert seen == {((16, 16), (24, 24))}


def test_a_run_that_was_stopped_ends_with_the_same_bits(ran, main, monkeypatch, tmp_path):
    output, _ = ran
    shutil.copytree(output / "teachers", tmp_path / "teachers")
    flags = ["--method", "at+crd", *FLAGS, "--no-pictures", "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 1)
    assert main([*flags, "--workers", "0"]) == 130
    mended()
    # other workers are no other run
    assert main([*flags, "--workers", "1", "--on-bad-image", "skip", "--resume"]) == 0
    one, other = (path / rows_of(path)[-1]["folder"] for path in (output, tmp_path))
    ours, theirs = (load(folder / "last.pt") for folder in (one, other))
    for key in ("model", "method", "optimizer"):
        assert bits(ours[key]) == bits(theirs[key]), key
    assert theirs["history"][-1]["skipped_images"] == 0


def test_a_dry_run_writes_nothing(main, place, capsys):
    before = sorted(place.rglob("*"))
    assert main(["--method", "at+crd", *FLAGS, "--workers", "0", "--output", "none", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(path for path in place.rglob("*") if "__pycache__" not in str(path)) == [
        path for path in before if "__pycache__" not in str(path)
    ]
    assert "features student: layer1 4×8×8, layer2 8×4×4; pooled 8\n" in said
    assert "features teacher: layer1 8×12×12, layer2 8×6×6; pooled 8\n" in said
    assert re.search(r"memory   [\d,]+ MiB", said)
    assert re.search(r"step     \d+ ms, of which the last 2 of 3 were timed", said)
    assert max(map(len, said.splitlines())) <= 100


def test_damaged_images_are_told_and_so_is_waiting(main, tmp_path, monkeypatch, capsys):
    root = make_images(tmp_path / "set")
    cut_short(root / "train" / "owl" / "3.jpg")
    cut_short(root / "val" / "cat" / "0.jpg")
    flags = ["--method", "baseline", *FLAGS, "--data", str(root), "--workers", "0", "--no-pictures"]
    flags = [flag for flag in flags if flag not in ("--teacher-size", "24")] + [
        "--output",
        str(tmp_path / "runs"),
    ]
    told = error_of(main, capsys, [*flags, "--seed", "1"])
    assert "set/" in told and "truncated" in told and "--on-bad-image skip goes on without it" in told
    assert main([*flags, "--on-bad-image", "skip"]) == 0
    said = capsys.readouterr().out
    assert said.count("image skipped: ") == 2 and "owl/3.jpg" in said and "cat/0.jpg" in said
    assert said.count("1 image of this epoch could not be read") == 2
    # without workers reading is waiting, and there is next to nothing else
    assert re.search(r"epoch 2: \d+ % of the steps' time was waiting for images: --workers is 0", said)
    row = rows_of(tmp_path / "runs")[-1]
    assert column(tmp_path / "runs" / row["folder"], "skipped_images") == [1, 1]


@pytest.mark.parametrize(("workers", "waits"), [("0", True), ("1", False)])
def test_waiting_is_told_only_where_the_workers_do_not_suffice(
    main, tmp_path, monkeypatch, capsys, workers, waits
):
    """A batch is read in 0.12 s and a step takes 0.3: one worker suffices, none does not."""
    step, read = TrainStep._run, files.read
    monkeypatch.setattr(TrainStep, "_run", lambda self, *rest: (time.sleep(0.3), step(self, *rest))[1])
    monkeypatch.setattr(files, "read", lambda path: (time.sleep(0.02), read(path))[1])  # 0.12 s a batch
    flags = ["--method", "baseline", *FLAGS, "--epochs", "1", "--workers", workers, "--no-pictures"]
    flags = [flag for flag in flags if flag not in ("--teacher-size", "24")]
    assert main([*flags, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert ("of the steps' time was waiting for images" in said) == waits and "epoch 1/1" in said


def test_a_file_that_is_damaged_while_it_runs_is_named_in_its_folder(main, tmp_path, monkeypatch, capsys):
    root, whole = make_images(tmp_path / "set"), Trainer.train_epoch

    def train_epoch(self, epoch, progress):
        if epoch == 2:
            cut_short(root / "train" / "owl" / "3.jpg")
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    flags = [flag for flag in FLAGS if flag not in ("--teacher-size", "24")]
    flags += ["--data", str(root), "--workers", "0", "--no-pictures", "--output", str(tmp_path / "runs")]
    told = error_of(main, capsys, ["--method", "baseline", *flags])
    assert "owl/3.jpg" in told and "--on-bad-image skip goes on without it" in told
    (folder,) = (tmp_path / "runs").glob("baseline-*")
    assert load(folder / "last.pt")["epoch"] == 1 and not (tmp_path / "runs" / "results.csv").exists()
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(" ended: " + told.removeprefix("train.py: error: ").rstrip())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--student-points", "layer1,layer9"], "student has no submodule 'layer9', wanted one such as"),
        (["--student-points", "layer1,spare"], "student_points[1] 'spare' did not run in this forward pass"),
        (["--student-points", "layer1,twice"], "student_points[1]: 'twice' gives tuple, wanted"),
        (["--student-points", "layer1,"], "has an empty name"),
        (["--student-points", "layer1,layer1"], "'layer1,layer1' has layer1 twice"),
        (["--student-checkpoint", "no.pt"], "--student-checkpoint no.pt: No such file"),
        (["--teacher-checkpoint", "no.pt"], "--teacher-checkpoint no.pt: No such file"),
        (["--method", "kd", "--option", "kd.weight=1,2", "--option", "kd.until=x"], "wanted a whole number"),
        (["--method", "kd", "--option", "kd.weight=1,1.0"], "is the same run as kd kd.weight=1"),
        (["--method", "semckd", "--batch-size", "19"], "--batch-size is 19, but folder has parts of only 18"),
        (["--resume"], "--resume: no unfinished run of this configuration"),
        (["--milestones", "0.5,x"], "--milestones: '0.5,x', wanted fractions with commas"),
        (["--student-points", "layer1", "--teacher-points", "layer1,layer2"], "--student-points layer1"),
        (["--student", "nets.py:plain"], "--student-points, such as"),
        (["--student", "nets.py:none"], "nets.py has no function 'none'; it has Twice, Small, student"),
        (["--student", "nets.py:stubborn"], "stubborn gives (2, 10) for 2 images, wanted (2, 3)"),
        (["--student", "nets.py:broken"], "broken(num_classes=3) fails: RuntimeError: no weights here"),
        (["--student", "nets.py:leaves"], "leaves(num_classes=3) fails: SystemExit: 3"),
        (["--student", "nets.py:lazy"], "'nets.py:lazy' has lazy parameters (0.weight), wanted"),
        (["--student", "nowhere.py:net"], "nowhere.py cannot be imported: no such file"),
        (["--student", "somewhere:net"], "'somewhere:net' is not known, wanted torchvision:NAME"),
        (["--image-size", "4"], "--image-size is 4, wanted at least 8"),
        (["--workers", "-1"], "--workers is -1, wanted at least 0"),
        (["--pad-mode", "zero"], "--pad-mode does nothing here: images of a folder are not padded"),
        (
            ["--student-size", "16"],
            "--image-size does nothing here: --student-size and --teacher-size are given",
        ),
        (["--dataset", "digits"], "--image-size does nothing here: it is for --dataset folder"),
        (["--data", "nothing"], "--data nothing has no folder train and no val or test"),
    ],
)
def test_what_cannot_be_is_one_line_before_training(main, place, capsys, flags, told):
    command = ["--method", "at", *FLAGS, "--output", "never", *flags]
    try:
        assert told in error_of(main, capsys, command)
    except SystemExit as error:  # argparse's own
        assert error.code == 2 and told in capsys.readouterr().err
    assert not (place / "never").exists()


def test_a_package_that_is_missing_is_one_line(main, monkeypatch, capsys):
    import sys

    for package in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.models", None)
        told = error_of(main, capsys, ["--method", "at", *FLAGS, "--student", f"{package}:resnet18"])
        assert f"--student {package}:resnet18: {package} " in told and f"pip install {package}" in told


def test_a_network_of_the_users_is_compiled_when_asked_alone(main, monkeypatch):
    """It may hold what does not compile as one graph."""
    monkeypatch.setattr(config, "WORTH_COMPILING", 1)
    monkeypatch.setattr(config, "can_compile", lambda device: True)

    def compiled(**fields):
        return config.Config(Settings("baseline", "folder", data="images", device="cpu", **fields)).compiled

    assert compiled(student="resnet8", overrides={"batch_size": 6})
    own = {"student": "nets.py:student", "overrides": {"batch_size": 6}}
    assert not compiled(**own) and compiled(**own, compile=True)


def test_students_side_by_side_have_the_bits_of_their_own_runs(ran, main, tmp_path, capsys):
    """Of a folder: one teacher's pass over images of its own size, banks, and workers of another number."""
    common = [*FLAGS, "--no-pictures", "--teacher-checkpoint", str(*(ran[0] / "teachers").glob("*.pt"))]
    methods = ("kd", "at", "crd")
    rest = ["--option", "crd.k=5"]
    together = [*common, "--workers", "1", *rest, "--output", str(tmp_path / "together")]
    assert main(["--method", ",".join(methods), *together]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 students side by side" in said and "answers to each batch once for kd, at, crd" in said
    rows = {row["method"]: row for row in rows_of(tmp_path / "together")}
    for method in methods:
        alone = [*common, "--workers", "0", *rest * (method == "crd"), "--output", str(tmp_path / "alone")]
        assert main(["--method", method, "--no-compile", *alone]) == 0
        row = rows_of(tmp_path / "alone")[-1]
        folders = tmp_path / "together" / rows[method]["folder"], tmp_path / "alone" / row["folder"]
        ours, theirs = (load(folder / "last.pt") for folder in folders)
        for key in ("model", "method", "optimizer"):
            assert bits(ours[key]) == bits(theirs[key]), (method, key)
        assert (row["acc"], row["losses"]) == (rows[method]["acc"], rows[method]["losses"])


def test_a_file_of_networks_belongs_to_the_run_by_its_text(ran, main, place, monkeypatch, tmp_path, capsys):
    from fastkd import plugins

    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "kd", *FLAGS, "--workers", "0", "--no-pictures"]
    mended = interrupt(monkeypatch, 3)  # after the teacher
    assert main(flags) == 130
    mended()
    (folder,) = tmp_path.glob("runs/kd-*")
    found = json.loads((folder / "config.json").read_text())["identity"]["plugins"]
    assert [*found] == ["model nets.py:student", "model nets.py:teacher"]
    (tmp_path / "nets.py").write_text(NETWORKS + "# changed\n")
    plugins.of_file.cache_clear()  # as in another process
    told = error_of(main, capsys, [*flags, "--resume"])
    origin = found["model nets.py:student"]
    assert f"the nearest is {folder.name}: model nets.py:student {origin} instead of nets.py " in told
    # a teacher of the other text is another one, which lies beside it
    (first,) = tmp_path.glob("runs/teachers/*.pt")
    before = first.read_bytes()
    assert main([*flags, "--epochs", "2"]) == 0
    assert "is not there yet; training it first" in capsys.readouterr().out
    assert len([*tmp_path.glob("runs/teachers/*.pt")]) == 2 and first.read_bytes() == before
    (tmp_path / "nets.py").write_text(NETWORKS)
    plugins.of_file.cache_clear()
    assert main([*flags, "--resume"]) == 0
    assert f"teacher: nets.py:teacher from {first.relative_to(tmp_path)}" in capsys.readouterr().out
