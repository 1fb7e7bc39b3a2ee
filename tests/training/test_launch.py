"""Processes are known by whoever started them; what is wrong with that is one line."""

from __future__ import annotations

import runpy
import sys
import types

import pytest
import torch
from runs import ROOT, of_two, ours
from support_data import QUICK

from fastkd.training import UserError, distributed, launch
from fastkd.training.command import command, command_file
from fastkd.training.config import Config, Settings
from fastkd.training.device import find_device

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


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
    # without an address, of which the first process speaks
    with pytest.raises(SystemExit, match="^2$"), distributed.group("cpu"):
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


def test_of_processes_without_an_address_the_first_alone_speaks(group, tmp_path):
    both = [{**STARTED["srun"], "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i)} for i in (0, 1)]
    answer, logs = group.run(
        tmp_path, both, flags=["--method", "at", *QUICK, "--output", str(tmp_path / "runs")]
    )
    assert answer["statuses"] == [2, 2] and len(ours(logs)) == 1 and logs[1] == ""
    assert not (tmp_path / "runs").exists()


def test_a_process_that_meets_nobody_speaks_for_itself(group, tmp_path):
    (alone,) = of_two(MASTER_PORT="no")[1:]
    answer, logs = group.run(tmp_path, [alone], flags=["--method", "at", *QUICK])
    assert answer["statuses"] == [2] and ours(logs)[0].startswith(
        "train.py: error: 2 processes cannot meet at 127.0.0.1:no "
    ), logs


def test_a_group_by_srun_and_an_address_joins(group, tmp_path):
    both = [{**of_two()[i], "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i)} for i in (0, 1)]
    for variables in both:
        del variables["RANK"], variables["WORLD_SIZE"]
    answer, logs = group.run(tmp_path, both, call="gradients", arguments=[tmp_path / "grads"])
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
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # the command would begin with it
    started(monkeypatch, **STARTED["torchrun within srun"], GROUP_WORLD_SIZE="2")
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (0, 4))
    plan = Config(Settings("baseline", "digits", student="resnet8", output=tmp_path, device="cpu"))
    assert command(plan).startswith("torchrun --nnodes 2 --nproc-per-node 2 train.py ")
    assert "on each of 2 machines, which --rdzv-endpoint brings together" in command_file(plan, "student")
