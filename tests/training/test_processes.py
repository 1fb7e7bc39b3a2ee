"""Several processes do what one does, end together, and are found however they were started."""

from __future__ import annotations

import csv
import functools
import json
import runpy
import sys
import types
from pathlib import Path

import distributed_worker
import pytest
import torch
import toy_methods
from image_folders import NETWORKS, make_images
from runs import bits, load, of_two, rows_of

from fastkd.training import UserError, distributed, launch
from fastkd.training.command import command, command_file
from fastkd.training.config import Config, Settings
from fastkd.training.device import find_device

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


def ours(logs):
    return [
        line
        for log in logs
        for line in log.splitlines()
        if line.startswith("train.py: ") or "Traceback" in line
    ]


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
        with open(output / "results.csv", newline="") as file:
            row = next(csv.DictReader(file))
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


def test_ctrl_c_before_anything_began_is_one_line(monkeypatch, capsys):
    """While PyTorch is imported, which takes the longest; each launcher has its own name for a process's
    number.
    """

    class Stop(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fastkd.training.cli", Stop("cli"))
    for variables in ({}, *({name: rank} for name in launch.RANK for rank in "01")):
        started(monkeypatch, **variables)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "train.py"))
        silent = "1" in variables.values()
        assert caught.value.code == 130
        assert capsys.readouterr().err == "train.py: stopped before anything began\n" * (not silent)


def test_a_run_of_two_processes_says_so_in_its_records_and_its_command(start, tmp_path):
    answer, logs = start(
        of_two(), flags=[*FLAGS, "--method", "baseline", "--epochs", "1", "--output", str(tmp_path / "runs")]
    )
    assert answer["statuses"] == [0, 0] and logs[1] == "", logs
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
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


def started(monkeypatch, **variables):
    for name in (
        *launch.RANK,
        *launch.WORLD,
        *launch.LOCAL,
        "MASTER_ADDR",
        "TORCHELASTIC_RUN_ID",
        "GROUP_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


STARTED = {
    "env": {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    "srun": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
    "srun, the world in the script": {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "WORLD_SIZE": "4"},
    "torchrun within srun": {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
    },
}


@pytest.mark.parametrize("by", STARTED)
def test_processes_are_known_by_whoever_started_them(monkeypatch, by):
    started(monkeypatch, **STARTED[by])
    assert launch.launched() == (1, 4, 1, 1, "torchrun" in by)
    with pytest.raises(SystemExit), distributed.group("cpu"):  # without an address, of which the first speaks
        pass


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"},  # a batch script's own process
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "3"},
    ],
    ids=str,
)
def test_a_process_that_is_alone_trains_alone(monkeypatch, variables):
    started(monkeypatch, **variables)
    assert launch.launched() is None
    with distributed.group("cpu"):
        assert distributed.share() == (0, 1) and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {**STARTED["srun"], "SLURM_PROCID": "0"},
            r"4 processes were started \(SLURM_STEP_NUM_TASKS\), but MASTER_ADDR is not set: .*torchrun",
        ),
        (
            {**STARTED["Open MPI"], "OMPI_COMM_WORLD_RANK": "0"},
            r"4 processes were started \(OMPI_COMM_WORLD_SIZE\)",
        ),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE is 2, but RANK is not set: .*torchrun"),
        ({"RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "RANK is 1, but WORLD_SIZE is not set: .*torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, wanted 0 to 1, since WORLD_SIZE is 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', wanted a number"),
        (
            {**STARTED["env"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "no"},
            "4 processes cannot meet at 127.0.0.1:no ",
        ),
    ],
)
def test_processes_that_cannot_meet_are_one_line(monkeypatch, variables, words):
    started(monkeypatch, **variables)
    with pytest.raises(UserError, match=words) as caught, distributed.group("cpu"):
        pass
    assert "\n" not in str(caught.value) and not torch.distributed.is_initialized()


def test_of_processes_without_an_address_the_first_alone_speaks(start, tmp_path):
    both = [{**STARTED["srun"], "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i)} for i in (0, 1)]
    answer, logs = start(both, flags=[*FLAGS, "--output", str(tmp_path / "runs")])
    assert answer["statuses"] == [2, 2] and len(ours(logs)) == 1 and logs[1] == ""
    assert not (tmp_path / "runs").exists()


def test_a_process_that_meets_nobody_speaks_for_itself(start):
    (alone,) = of_two(MASTER_PORT="no")[1:]
    answer, logs = start([alone], flags=FLAGS)
    assert answer["statuses"] == [2] and ours(logs)[0].startswith(
        "train.py: error: 2 processes cannot meet at 127.0.0.1:no "
    ), logs


def test_a_group_by_srun_and_an_address_joins(start, tmp_path):
    both = [{**of_two()[i], "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i)} for i in (0, 1)]
    for variables in both:
        del variables["RANK"], variables["WORLD_SIZE"]
    answer, logs = start(both, call="gradients", arguments=[tmp_path / "grads"])
    assert answer["statuses"] == [0, 0] and torch.load(tmp_path / "grads-1.pt")[0].tolist() == [5.5, 5.5], (
        logs
    )


@pytest.mark.parametrize(
    ("there", "by", "index"),
    [
        (4, "env", 1),
        (1, "srun", 0),
        (1, "torchrun within srun", None),
        (0, "srun", None),
        (4, "torchrun within srun", 1),
    ],
)
def test_each_process_has_its_own_gpu(monkeypatch, there, by, index):
    started(monkeypatch, **STARTED[by])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    if index is not None:
        assert distributed.gpu_index() == index and (
            there == 0 or find_device("cuda") == torch.device("cuda", index)
        )
    else:
        with pytest.raises(
            UserError, match=f"process 1 of this machine, counted from 0, has no GPU: PyTorch sees {there}"
        ):
            distributed.gpu_index()


def test_the_command_of_several_machines_names_them(monkeypatch, tmp_path):
    started(monkeypatch, **STARTED["torchrun within srun"], GROUP_WORLD_SIZE="2")
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (0, 4))
    plan = Config(Settings("baseline", "digits", student="resnet8", output=tmp_path, device="cpu"))
    assert command(plan).startswith("torchrun --nnodes 2 --nproc-per-node 2 train.py ")
    assert "on each of 2 machines, which --rdzv-endpoint brings together" in command_file(plan, "student")
