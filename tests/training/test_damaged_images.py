"""Image files that are damaged, and time that is spent waiting for files."""

from __future__ import annotations

import re
import time

import pytest
from image_folders import FLAGS_WITHOUT_TEACHER, cut_short, make_images
from record_files import column, rows_of
from run_cases import error_of
from runs import load

from fastkd.data import files
from fastkd.training import Trainer
from fastkd.training.step import TrainStep


def test_damaged_images_are_told_and_so_is_waiting(folder_main, tmp_path, capsys):
    root = make_images(tmp_path / "set")
    cut_short(root / "train" / "owl" / "3.jpg")
    cut_short(root / "val" / "cat" / "0.jpg")
    flags = ["--method", "baseline", *FLAGS_WITHOUT_TEACHER, "--data", str(root), "--workers", "0"]
    flags += ["--no-pictures", "--output", str(tmp_path / "runs")]
    told = error_of(folder_main, capsys, [*flags, "--seed", "1"])
    assert "set/" in told and "truncated" in told and "--on-bad-image skip goes on without it" in told
    assert folder_main([*flags, "--on-bad-image", "skip"]) == 0
    said = capsys.readouterr().out
    assert said.count("image skipped: ") == 2 and "owl/3.jpg" in said and "cat/0.jpg" in said
    assert said.count("1 image of this epoch could not be read") == 2
    # without workers reading is waiting, and there is next to nothing else
    assert re.search(r"epoch 2: \d+ % of the steps' time was waiting for images: --workers is 0", said)
    row = rows_of(tmp_path / "runs")[-1]
    assert column(tmp_path / "runs" / row["folder"], "skipped_images") == [1, 1]


@pytest.mark.parametrize(("workers", "waits"), [("0", True), ("1", False)])
def test_waiting_is_told_only_where_the_workers_do_not_suffice(
    folder_main, tmp_path, monkeypatch, capsys, workers, waits
):
    """A batch is read in 0.12 s and a step takes 0.3: one worker suffices, none does not."""
    step, read = TrainStep._run, files.read
    monkeypatch.setattr(TrainStep, "_run", lambda self, *rest: (time.sleep(0.3), step(self, *rest))[1])
    monkeypatch.setattr(files, "read", lambda path: (time.sleep(0.02), read(path))[1])  # 0.12 s a batch
    flags = ["--method", "baseline", *FLAGS_WITHOUT_TEACHER, "--epochs", "1", "--workers", workers]
    assert folder_main([*flags, "--no-pictures", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert ("of the steps' time was waiting for images" in said) == waits and "epoch 1/1" in said


def test_a_file_that_is_damaged_while_it_runs_is_named_in_its_folder(
    folder_main, tmp_path, monkeypatch, capsys
):
    root, whole = make_images(tmp_path / "set"), Trainer.train_epoch

    def train_epoch(self, epoch, progress):
        if epoch == 2:
            cut_short(root / "train" / "owl" / "3.jpg")
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    flags = [
        *FLAGS_WITHOUT_TEACHER,
        "--data",
        str(root),
        "--workers",
        "0",
        "--no-pictures",
        "--output",
        str(tmp_path / "runs"),
    ]
    told = error_of(folder_main, capsys, ["--method", "baseline", *flags])
    assert "owl/3.jpg" in told and "--on-bad-image skip goes on without it" in told
    (folder,) = (tmp_path / "runs").glob("baseline-*")
    assert load(folder / "last.pt")["epoch"] == 1 and not (tmp_path / "runs" / "results.csv").exists()
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(" ended: " + told.removeprefix("train.py: error: ").rstrip())
