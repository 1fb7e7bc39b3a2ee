"""The command with a user's networks and a folder of images, from the first screen to the last picture."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch
from image_folders import FLAGS, NETWORKS
from record_files import column, interrupt, rows_of
from run_cases import error_of
from runs import bits, load

from fastkd import Distillation, evaluate, plugins
from fastkd.models import load_student
from fastkd.report import maps
from fastkd.training import Settings, config


@pytest.fixture
def ran(folder_main, folder_place, capsys):
    """(output folder, what was printed) of a run with AT and CRD and two workers, made once."""
    if not (folder_place / "runs").exists():
        assert folder_main(["--method", "at+crd", *FLAGS, "--workers", "2", "--output", "runs"]) == 0
        (folder_place / "said").write_text(capsys.readouterr().out)
    return folder_place / "runs", (folder_place / "said").read_text()


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


def test_simkds_student_is_loaded_with_what_was_put_into_it(ran, folder_main, tmp_path):
    teacher = str(*(ran[0] / "teachers").glob("*.pt"))
    flags = ["--method", "simkd", *FLAGS, "--epochs", "1", "--workers", "0", "--no-pictures"]
    flags += ["--student-points", "layer1,layer2"]
    assert folder_main([*flags, "--teacher-checkpoint", teacher, "--output", str(tmp_path)]) == 0
    folder = next(tmp_path.glob("simkd-*"))
    assert "teacher_size=24 student_points=layer1,layer2" in rows_of(tmp_path)[0]["overrides"]
    student = load_student(folder)
    assert torch.equal(student.head.weight, load(teacher)["model"]["head.weight"])
    assert (
        student(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
        and evaluate.test(folder, data="images").images == 6
    )


def test_the_teacher_gets_the_size_that_is_its_own(ran, folder_main, monkeypatch, tmp_path):
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
    assert folder_main([*flags, "--teacher-checkpoint", teacher, "--output", str(tmp_path)]) == 0
    assert seen == {((16, 16), (24, 24))}


def test_a_run_that_was_stopped_ends_with_the_same_bits(ran, folder_main, monkeypatch, tmp_path):
    output, _ = ran
    shutil.copytree(output / "teachers", tmp_path / "teachers")
    flags = ["--method", "at+crd", *FLAGS, "--no-pictures", "--output", str(tmp_path)]
    mended = interrupt(monkeypatch, 1)
    assert folder_main([*flags, "--workers", "0"]) == 130
    mended()
    # other workers are no other run
    assert folder_main([*flags, "--workers", "1", "--on-bad-image", "skip", "--resume"]) == 0
    one, other = (path / rows_of(path)[-1]["folder"] for path in (output, tmp_path))
    ours, theirs = (load(folder / "last.pt") for folder in (one, other))
    for key in ("model", "method", "optimizer"):
        assert bits(ours[key]) == bits(theirs[key]), key
    assert theirs["history"][-1]["skipped_images"] == 0


def test_a_dry_run_writes_nothing(folder_main, folder_place, capsys):
    before = sorted(folder_place.rglob("*"))
    assert folder_main(["--method", "at+crd", *FLAGS, "--workers", "0", "--output", "none", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(path for path in folder_place.rglob("*") if "__pycache__" not in str(path)) == [
        path for path in before if "__pycache__" not in str(path)
    ]
    assert "features student: layer1 4×8×8, layer2 8×4×4; pooled 8\n" in said
    assert "features teacher: layer1 8×12×12, layer2 8×6×6; pooled 8\n" in said
    assert re.search(r"memory   [\d,]+ MiB", said)
    assert re.search(r"step     \d+ ms, of which the last 2 of 3 were timed", said)
    assert max(map(len, said.splitlines())) <= 100


def test_a_network_of_the_users_is_compiled_when_asked_alone(folder_main, monkeypatch):
    """It may hold what does not compile as one graph."""
    monkeypatch.setattr(config, "WORTH_COMPILING", 1)
    monkeypatch.setattr(config, "can_compile", lambda device: True)

    def compiled(**fields):
        return config.Config(Settings("baseline", "folder", data="images", device="cpu", **fields)).compiled

    assert compiled(student="resnet8", overrides={"batch_size": 6})
    own = {"student": "nets.py:student", "overrides": {"batch_size": 6}}
    assert not compiled(**own) and compiled(**own, compile=True)


def test_students_side_by_side_have_the_bits_of_their_own_runs(ran, folder_main, tmp_path, capsys):
    """Of a folder: one teacher's pass over images of its own size, banks, and workers of another number."""
    common = [*FLAGS, "--no-pictures", "--teacher-checkpoint", str(*(ran[0] / "teachers").glob("*.pt"))]
    methods = ("kd", "at", "crd")
    rest = ["--option", "crd.k=5"]
    together = [*common, "--workers", "1", *rest, "--output", str(tmp_path / "together")]
    assert folder_main(["--method", ",".join(methods), *together]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 students side by side" in said and "answers to each batch once for kd, at, crd" in said
    rows = {row["method"]: row for row in rows_of(tmp_path / "together")}
    for method in methods:
        alone = [*common, "--workers", "0", *rest * (method == "crd"), "--output", str(tmp_path / "alone")]
        assert folder_main(["--method", method, "--no-compile", *alone]) == 0
        row = rows_of(tmp_path / "alone")[-1]
        folders = tmp_path / "together" / rows[method]["folder"], tmp_path / "alone" / row["folder"]
        ours, theirs = (load(folder / "last.pt") for folder in folders)
        for key in ("model", "method", "optimizer"):
            assert bits(ours[key]) == bits(theirs[key]), (method, key)
        assert (row["acc"], row["losses"]) == (rows[method]["acc"], rows[method]["losses"])


def test_a_file_of_networks_belongs_to_the_run_by_its_text(
    ran, folder_main, folder_place, monkeypatch, tmp_path, capsys
):
    shutil.copytree(folder_place / "images", tmp_path / "images")
    (tmp_path / "nets.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    flags = ["--method", "kd", *FLAGS, "--workers", "0", "--no-pictures"]
    mended = interrupt(monkeypatch, 3)  # after the teacher
    assert folder_main(flags) == 130
    mended()
    (folder,) = tmp_path.glob("runs/kd-*")
    found = json.loads((folder / "config.json").read_text())["identity"]["plugins"]
    assert [*found] == ["model nets.py:student", "model nets.py:teacher"]
    (tmp_path / "nets.py").write_text(NETWORKS + "# changed\n")
    plugins.of_file.cache_clear()  # as in another process
    told = error_of(folder_main, capsys, [*flags, "--resume"])
    origin = found["model nets.py:student"]
    assert f"the nearest is {folder.name}: model nets.py:student {origin} instead of nets.py " in told
    # a teacher of the other text is another one, which lies beside it
    (first,) = tmp_path.glob("runs/teachers/*.pt")
    before = first.read_bytes()
    assert folder_main([*flags, "--epochs", "2"]) == 0
    assert "is not there yet; training it first" in capsys.readouterr().out
    assert len([*tmp_path.glob("runs/teachers/*.pt")]) == 2 and first.read_bytes() == before
    (tmp_path / "nets.py").write_text(NETWORKS)
    plugins.of_file.cache_clear()
    assert folder_main([*flags, "--resume"]) == 0
    assert f"teacher: nets.py:teacher from {first.relative_to(tmp_path)}" in capsys.readouterr().out
