"""``python -m fastkd.evaluate``: what a checkpoint's network answers, and what cannot be tested."""

from __future__ import annotations

import re

import pytest
import torch
from image_folders import cut_short, make_images
from record_files import rows_of

from fastkd.evaluate import main
from fastkd.models import create_model
from fastkd.training.recipes import NORMALIZATIONS

FLAGS = [
    "--dataset",
    "digits",
    "--teacher",
    "resnet8",
    "--student",
    "resnet8",
    "--epochs",
    "1",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("method", ["simkd", "norm", "baseline"])
def test_a_run_is_tested_with_what_its_method_has_put_in(small_main, tmp_path, capsys, method):
    assert small_main(["--method", method, *FLAGS, "--no-pictures", "--output", str(tmp_path)]) == 0
    row = rows_of(tmp_path)[-1]
    folder = tmp_path / row["folder"]
    saved = torch.load(folder / "best.pt", weights_only=True)["model"]
    if method == "baseline":
        torch.save(saved, tmp_path / "bare.pt")
    parameters = sum(x.numel() for name, x in saved.items() if not re.search("running|num_batches", name))
    calls = [[str(folder)], [str(folder / "best.pt"), "--batch-size", "7"]]
    if method == "baseline":
        calls.append([str(tmp_path / "bare.pt"), "--model", "resnet8", "--dataset", "digits"])
    for arguments in calls:
        capsys.readouterr()
        assert main([*arguments, "--device", "cpu"]) == 0
        found = re.fullmatch(
            r"resnet8 on digits: (\S+) % of (\d+) test images, ([\d,]+) parameters, ([\d,]+) images/s\n",
            capsys.readouterr().out,
        )
        assert found and float(found[1]) == pytest.approx(float(row["acc"]), abs=0.006)
        assert int(found[3].replace(",", "")) == parameters and int(found[4].replace(",", "")) > 0


def test_images_are_normalized_as_in_the_run_or_as_asked(small_main, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(NORMALIZATIONS, ("ofd", "digits"), ((0.9,) * 3, (0.05,) * 3))
    flags = ["--method", "baseline", *FLAGS, "--no-pictures", "--normalization", "ofd"]
    assert small_main([*flags, "--output", str(tmp_path)]) == 0
    row = rows_of(tmp_path)[-1]
    folder = tmp_path / row["folder"]
    torch.save(torch.load(folder / "best.pt", weights_only=True)["model"], tmp_path / "bare.pt")
    bare = [str(tmp_path / "bare.pt"), "--model", "resnet8", "--dataset", "digits", "--device", "cpu"]
    found = []
    for arguments in ([str(folder), "--device", "cpu"], [*bare, "--normalization", "ofd"], bare):
        capsys.readouterr()
        assert main(arguments) == 0
        found.append(float(capsys.readouterr().out.split()[3]))
    assert found[:2] == [pytest.approx(float(row["acc"]), abs=0.006)] * 2 and found[2] != found[0]
    assert main([*bare, "--normalization", "repdistiller"]) == 2
    assert "--normalization is repdistiller, which has no constants for digits" in capsys.readouterr().err


def test_what_cannot_be_tested_is_one_line(tmp_path, capsys):
    pytest.importorskip("sklearn")
    bare, other = tmp_path / "bare.pt", tmp_path / "other.pt"
    torch.save(create_model("resnet8").state_dict(), bare)
    torch.save(create_model("resnet20", 7).state_dict(), other)
    whole = ["--dataset", "digits", "--device", "cpu"]
    for arguments, words in (
        ([str(tmp_path / "none.pt")], "none.pt: No such file"),
        ([str(tmp_path)], "best.pt: No such file"),
        ([str(bare)], "is of no run, wanted --model"),
        ([str(bare), "--model", "resnet8"], "is of no run, wanted --dataset"),
        ([str(bare), "--model", "resnet9", *whole], "--model 'resnet9' is not known; known: resnet8"),
        ([str(bare), "--model", "resnet20", *whole], "bare.pt"),
        ([str(other), "--model", "resnet20", *whole], "other.pt"),
        (
            [str(bare), "--model", "resnet8", *whole, "--batch-size", "0"],
            "--batch-size is 0, wanted at least 1",
        ),
        ([str(bare), "--model", "resnet8", *whole, "--workers", "-1"], "--workers is -1, wanted at least 0"),
        (
            [str(bare), "--model", "resnet8", *whole, "--image-size", "0"],
            "--image-size is 0, wanted at least 8",
        ),
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert (
            told.startswith("python -m fastkd.evaluate: error: ") and words in told and told.count("\n") == 1
        )


def test_a_damaged_image_is_told_without_a_flag_of_another_command(tmp_path, capsys):
    pytest.importorskip("PIL")
    root, bare = make_images(tmp_path / "set"), tmp_path / "bare.pt"
    cut_short(root / "val" / "cat" / "0.jpg")
    torch.save(create_model("resnet8", len([*(root / "val").iterdir()])).state_dict(), bare)
    flags = ["--model", "resnet8", "--dataset", "folder", "--data", str(root), "--image-size", "32"]
    assert main([str(bare), *flags, "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "cat/0.jpg" in told and "--on-bad-image" not in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("(z, z)", "small.pt gives tuple for 250 images, wanted (250, 10)"),
        ("z[..., None]", "small.pt gives (250, 10, 1) for 250 images, wanted (250, 10)"),
        ("z @ x", "small.pt does not take images (3, 32, 32) (RuntimeError: "),
    ],
)
def test_a_network_that_gives_no_logits_is_one_line(tmp_path, capsys, answer, words):
    pytest.importorskip("sklearn")
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "class Small(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        f"        z = super().forward(x.flatten(1))\n        return {answer}\n"
        "def small(num_classes):\n    return Small(3 * 32 * 32, num_classes)\n"
    )
    name, file = f"{tmp_path}/nets.py:small", tmp_path / "small.pt"
    torch.save(create_model(name).state_dict(), file)
    assert main([str(file), "--model", name, "--dataset", "digits", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1
