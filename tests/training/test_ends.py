"""What ends early: a term by its option, and a run by an error, which its folder tells."""

from __future__ import annotations

import shutil

import pytest
import torch
from record_files import column, interrupt, rows_of
from run_cases import error_of
from runs import bits, load
from support_data import QUICK

from fastkd.training import Trainer


def test_a_term_that_ends_is_in_the_row_and_goes_on_to_the_same_bits(
    small_main, tmp_path, monkeypatch, capsys
):
    flags = ["--method", "at+kd", *QUICK, "--epochs", "3", "--option", "kd.until=2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert small_main([*flags, "--output", str(whole)]) == 0
    row = rows_of(whole)[-1]
    assert "kd.until=2" in row["overrides"].split() and "kd=0" in row["losses"].split()
    first, second, last = column(whole / row["folder"], "kd")
    assert first > 0 and second > 0 and last == 0 and min(column(whole / row["folder"], "at")) > 0
    shutil.copytree(whole / "teachers", parted / "teachers")
    mended = interrupt(monkeypatch, 3)  # before the epoch without the term
    assert small_main([*flags, "--output", str(parted)]) == 130
    mended()
    capsys.readouterr()
    assert small_main([*flags[:-1], "kd.until=1", "--output", str(parted), "--resume"]) == 2
    assert "kd.until 2 instead of 1" in capsys.readouterr().err
    assert small_main([*flags, "--output", str(parted), "--resume"]) == 0
    assert "goes on after epoch 2 of 3" in capsys.readouterr().out
    again = rows_of(parted)[-1]
    assert [again[name] for name in ("acc", "losses", "overrides")] == [
        row[name] for name in ("acc", "losses", "overrides")
    ]
    ours, theirs = (
        load(output / one["folder"] / "last.pt") for output, one in ((parted, again), (whole, row))
    )
    for key in ("model", "method", "optimizer"):
        assert bits(ours[key]) == bits(theirs[key]), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_is_named_in_the_folder_and_what_was_saved_stays(
    small_main, tmp_path, monkeypatch, capsys, precision
):
    whole = Trainer.train_epoch

    def train_epoch(self, epoch, progress):
        if epoch == 2:
            with torch.no_grad():
                next(self.student.parameters()).fill_(float("inf"))
        whole(self, epoch, progress)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    flags = ["--method", "baseline", *QUICK, "--epochs", "3", "--precision", precision]
    told = error_of(small_main, capsys, [*flags, "--output", str(tmp_path)])
    assert "the loss is no longer finite in epoch 2, step 2: try a smaller --lr" in told
    (folder,) = tmp_path.glob("baseline-*")
    lines = (folder / "log.txt").read_text().splitlines()
    assert lines[-1].startswith("# ")
    assert lines[-1].endswith(" ended: " + told.removeprefix("train.py: error: ").rstrip())
    saved = load(folder / "last.pt")
    assert saved["epoch"] == 1 and all(x.isfinite().all() for x in saved["model"].values())
    assert not (tmp_path / "results.csv").exists() and column(folder, "loss") == [saved["history"][0]["loss"]]
