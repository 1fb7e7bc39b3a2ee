"""What cannot be trained with a user's networks and a folder of images: one line, before training."""

from __future__ import annotations

import sys

import pytest
from image_folders import FLAGS
from run_cases import error_of


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
def test_what_cannot_be_is_one_line_before_training(folder_main, folder_place, capsys, flags, told):
    command = ["--method", "at", *FLAGS, "--output", "never", *flags]
    try:
        assert told in error_of(folder_main, capsys, command)
    except SystemExit as error:  # argparse's own
        assert error.code == 2 and told in capsys.readouterr().err
    assert not (folder_place / "never").exists()


def test_a_package_that_is_missing_is_one_line(folder_main, monkeypatch, capsys):
    for package in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.models", None)
        told = error_of(folder_main, capsys, ["--method", "at", *FLAGS, "--student", f"{package}:resnet18"])
        assert f"--student {package}:resnet18: {package} " in told and f"pip install {package}" in told
