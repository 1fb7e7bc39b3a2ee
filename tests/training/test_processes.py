"""Several processes do what one does, end together, and are found however they were started."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path

import distributed_worker
import pytest
import torch
import toy_methods
from image_folders import NETWORKS, make_images
from record_files import rows_of
from runs import bits, load, of_two, ours

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--method at --dataset digits --teacher resnet8 --student resnet8 --batch-size 16".split()
FLAGS += ["--device", "cpu"]
FLAGS += ["--epochs", "2", "--recipe", "hankyul2", "--no-pictures"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture
def start(group, tmp_path):
    """Runs a job of tests/helpers/processes_worker.py; returns its answer and what each process printed."""
    return functools.partial(group.run, tmp_path)


def test_parameters_without_a_gradient_in_any_process_have_none(start, tmp_path):
    answer, logs = start(of_two(), call="gradients", arguments=[tmp_path / "grads"])
    assert answer["statuses"] == [0, 0], logs
    for rank in (0, 1):
        found = torch.load(tmp_path / f"grads-{rank}.pt")
        assert found[3] is None
        assert [grad.tolist() for grad in found[:3]] == [[5.5, 5.5], [0.5, 0.5], [5.0, 5.0]]


def test_a_classifier_that_the_loss_never_reaches_is_not_decayed(start, tmp_path, one_thread):
    answer, logs = start(of_two(), call="initialization", arguments=[tmp_path / "two"])
    assert answer["statuses"] == [0, 0], logs
    one = distributed_worker.loop("fsp", alone=True, epochs=3, weight_decay=0.5)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two-{rank}.pt")
        assert torch.equal(two["model"]["fc.weight"], one.student.fc.weight) and two["momenta"] == len(
            one.optimizer.state
        )
        torch.testing.assert_close(two["model"], one.student.state_dict(), rtol=1e-5, atol=1e-7)


def test_two_processes_read_the_images_of_one(start, tmp_path, one_thread):
    """Each its part, by workers of its own, and the same part of an image as one process cuts out."""
    pytest.importorskip("PIL")
    root = make_images(tmp_path / "images")
    (tmp_path / "nets.py").write_text(NETWORKS)
    flags = ["--method", "baseline", "--dataset", "folder", "--data", str(root), "--image-size", "16"]
    flags += [
        "--student",
        f"{tmp_path / 'nets.py'}:plain",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--no-pictures",
    ]
    two = [*flags, "--batch-size", "3", "--workers", "1", "--output", str(tmp_path / "two")]
    answer, logs = start(of_two(), flags=two)
    assert answer["statuses"] == [0, 0], logs
    main = runpy.run_path(str(ROOT / "train.py"))["main"]
    assert main([*flags, "--batch-size", "6", "--workers", "0", "--output", str(tmp_path / "one")]) == 0
    found = []
    for output in (tmp_path / "two", tmp_path / "one"):
        row = rows_of(output)[0]
        found.append(torch.load(output / row["folder"] / "last.pt", weights_only=True))
    torch.testing.assert_close(found[0]["model"], found[1]["model"], rtol=1e-4, atol=1e-6)
    assert found[0]["history"][-1]["test_acc"] == found[1]["history"][-1]["test_acc"]


def test_rows_of_all_processes_reach_a_method_that_keeps_them(start, tmp_path, one_thread):
    answer, logs = start(of_two(), call="banks", arguments=[tmp_path / "two"])
    assert answer["statuses"] == [0, 0], logs
    one = distributed_worker.loop(toy_methods.define("bank")).distillation.methods["bank"].bank
    two = [torch.load(tmp_path / f"two-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(two[0]["bank"], two[1]["bank"]) and one.any(1).all()
    torch.testing.assert_close(two[0]["bank"], one, rtol=1e-4, atol=1e-6)
    one = distributed_worker.loop("crd").distillation.methods["crd"].function.state_dict()
    for name, value in one.items():  # after the first step, in which each process has its own normalizers
        assert torch.equal(two[0]["crd"][name], two[1]["crd"][name])
        torch.testing.assert_close(two[0]["crd"][name], value, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(two[0]["crd"]["normalizers"], one["normalizers"], rtol=1e-5, atol=0)
    for found in two:
        index, (record,) = found["joined"]
        assert index.tolist() == [0, 1, 2, 3, 4] and record.tolist() == [[0.0], [2.0], [4.0], [6.0], [8.0]]


PLACES = {
    "the first, in a step": (0, "fastkd.distillation:Distillation.forward", 2),
    "another, in a step": (1, "fastkd.distillation:Distillation.forward", 2),
    "another, after the last step": (1, "fastkd.data.loader:Batches.sizes", 2),
    "another, in the test": (1, "fastkd.training.trainer:evaluate", 1),
    "another, in a sum itself": (1, "fastkd.training.collectives:_sum", 2),
    "another, in its plan": (1, "fastkd.training.config:Config.__init__", 1),
    "another, in its loop": (1, "fastkd.training.trainer:Trainer.__init__", 1),
    "the first, between epochs": (0, "fastkd.training.run_dir:RunDir.write_epoch_files", 1),
}


def fails(rank, place, call, error="UserError"):
    return {"fault": {"rank": rank, "place": place, "call": call, "error": error}}


@pytest.mark.parametrize("what", ["a loss not finite, seen in mid-epoch", *PLACES])
def test_a_failure_of_one_process_ends_all_at_once_with_one_line(start, tmp_path, what):
    flags, words = [*FLAGS, "--method", "baseline", "--output", tmp_path / "runs"], "planted"
    if what in PLACES:
        job = fails(*PLACES[what])
    else:
        flags, job, words = (
            [*flags, "--lr", "1e30"],
            {"terminal": True},
            "the loss is no longer finite in epoch 1",
        )
    answer, logs = start(of_two(), flags=list(map(str, flags)), **job)
    assert answer["statuses"] in ([2, 0], [2, 1]), (answer, logs)
    assert len(ours(logs)) == 1 and ours(logs)[0].startswith(f"train.py: error: {words}"), logs
    if what in PLACES:
        # well below one where nothing else runs; the group's timeout is half an hour
        assert answer["seconds"] < 10


@pytest.mark.parametrize("methods", ["kd", "kd,crd"])
def test_a_loss_that_is_no_number_ends_all_students_and_seeds(start, tmp_path, methods):
    flags = [*FLAGS, "--method", methods, "--option", "kd.weight=1e38", "--repeats", "2"]
    answer, logs = start(of_two(), flags=[*flags, "--output", str(tmp_path)])
    assert answer["statuses"] in ([2, 0], [2, 1], [2, 2]), (answer, logs)
    assert len(ours(logs)) == 1 and "the loss is no longer finite in epoch 1" in ours(logs)[0], logs
    assert "runs are finished" not in logs[0] and "run 2 of 2" not in logs[0]


def test_a_failure_of_the_last_of_three_is_told_by_the_first(start, tmp_path):
    flags = [*FLAGS, "--method", "baseline", "--output", str(tmp_path / "runs")]
    answer, logs = start(of_two(3), flags=flags, **fails(2, "fastkd.training.collectives:_sum", 1))
    assert (
        answer["statuses"] == [2, 1, 1]
        and ours(logs) == ["train.py: error: planted"]
        and logs[1:] == ["", ""]
    ), (answer, logs)
    assert answer["seconds"] < 10


def test_the_others_wait_as_long_as_the_first_says_that_it_is_busy(start, tmp_path):
    answer, logs = start(of_two(), call="answers", arguments=[tmp_path / "answer"])
    assert answer["statuses"] == [0, 0], logs
    assert [torch.load(tmp_path / f"answer-{rank}.pt") for rank in (0, 1)] == [7, 7]


@pytest.mark.parametrize(
    ("rank", "error", "statuses", "words"),
    [
        (1, "RuntimeError", [2, 99], "train.py: error: process 1 of 2 failed with RuntimeError: planted"),
        (0, "MemoryError", [99, 1], "Traceback: MemoryError('planted')"),
        (0, "Interrupted", [130, 1], "train.py: planted"),
    ],
)
def test_any_exception_of_one_process_ends_all(start, tmp_path, rank, error, statuses, words):
    flags = [*FLAGS, "--method", "baseline", "--output", str(tmp_path / "runs")]
    answer, logs = start(
        of_two(), flags=flags, **fails(rank, "fastkd.distillation:Distillation.forward", 2, error)
    )
    assert answer["statuses"] == statuses, (answer, logs)
    assert words in ours(logs) and len(ours(logs)) == 1 + (rank == 1), logs
    assert answer["seconds"] < 10


# before the processes know each other, and when they do
@pytest.mark.parametrize("place", ["fastkd.training.cli:build_parser", "fastkd.training.distributed:leads"])
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_all_processes_while_they_start_is_one_line(start, tmp_path, place, name, status):
    flags = [*FLAGS, "--method", "baseline", "--output", str(tmp_path / "runs")]
    answer, logs = start(of_two(), flags=flags, **fails(None, place, 1, name))
    assert ours(logs) == ["train.py: stopped while nothing was being trained; what was finished is kept"], (
        logs
    )
    assert answer["statuses"] == [status] * 2 and answer["seconds"] < 10


def test_a_wrong_flag_of_all_processes_is_one_line(start, tmp_path):
    answer, logs = start(of_two(), flags=[*FLAGS, "--lr", "fast"])
    assert answer["statuses"] == [2, 2] and len(ours(logs)) == 1 and logs[1] == ""


def test_a_run_of_two_processes_says_so_in_its_records_and_its_command(start, tmp_path):
    answer, logs = start(
        of_two(), flags=[*FLAGS, "--method", "baseline", "--epochs", "1", "--output", str(tmp_path / "runs")]
    )
    assert answer["statuses"] == [0, 0] and logs[1] == "", logs
    (row,) = rows_of(tmp_path / "runs")
    assert (row["processes"], row["batch_size"]) == ("2", "16")
    folder = tmp_path / "runs" / row["folder"]
    script = (folder / "command.sh").read_text().splitlines()[-1]
    again = next(line for line in logs[0].splitlines() if line.startswith("again")).split(None, 1)[1]
    for text in (script, again, json.loads((folder / "config.json").read_text())["command"]):
        assert "torchrun --standalone --nproc-per-node 2 train.py --method baseline " in text, text


def test_students_side_by_side_in_two_processes_have_the_bits_of_their_own_runs(start, tmp_path):
    for method in ("kd,crd", "crd"):
        flags = [*FLAGS, "--method", method, "--epochs", "1", "--output", str(tmp_path)]
        answer, logs = start(of_two(), flags=flags)
        assert answer["statuses"] == [0, 0] and logs[1] == "", logs
    assert [row["method"] for row in rows_of(tmp_path)] == ["teacher", "kd", "crd", "crd"]
    together, alone = (load(tmp_path / row["folder"] / "last.pt") for row in rows_of(tmp_path)[2:])
    assert bits(together) == bits(alone)
