"""Several processes under torchrun learn what one learns, leave what one leaves, and end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from record_files import rows_of
from runs import of_two
from support_data import small_digits

from fastkd import data as datasets
from fastkd.training import Batches, UserError
from fastkd.training.config import Config, Settings

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--method at --dataset digits --teacher resnet8 --student resnet8 --batch-size 16".split()
FLAGS += ["--device", "cpu"]
FLAGS += ["--epochs", "2", "--recipe", "hankyul2"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


def start(processes, *arguments, **extra):
    paths = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH")])
    )
    worker = [str(ROOT / "tests" / "helpers" / "distributed_worker.py"), *map(str, arguments)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *launch, *worker],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **extra},
        # a shell's background job ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def torchrun(group, folder, *flags, **variables):
    """The same of the command, by forks of a process that has imported it: (status, what all printed)."""
    arguments = list(map(str, flags))
    answer, logs = group.run(folder, [variables], call="torchrun", arguments=arguments, limit=300)
    return answer["statuses"][0], logs[0]


def test_each_process_has_its_part_of_every_batch():
    images, labels = torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8), torch.arange(23)
    one = Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=6)
    parts = [
        Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=2, share=(rank, 3)) for rank in range(3)
    ]
    assert len(one) == 4 and one.sizes() == [6, 6, 6, 5]
    # the third would have one image of the last 5
    assert [len(part) for part in parts] == [3] * 3 and parts[0].sizes() == [6, 6, 6]
    for (whole, which), *mine in zip(one.train(2), *(part.train(2) for part in parts), strict=False):
        assert torch.equal(torch.cat([x for x, _ in mine]), whole) and torch.equal(
            torch.cat([y for _, y in mine]), which
        )
    last = [
        Batches(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size=2, share=(rank, 3), drop_last=True)
        for rank in range(3)
    ]
    assert [len(part) for part in last] == [3] * 3
    tested = [y.tolist() for _, y in parts[1].test()]
    assert [len(y) for y in tested] == [2] * 11 + [1]  # of the test set each process is told its share
    for rank in range(3):
        assert [y.tolist() for _, y in parts[1].test((rank, 3))] == tested[rank::3]


def test_two_processes_learn_what_one_learns_from_the_joined_batches(tmp_path):
    done = start(2, "loop", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    # what outlives the group can abort the interpreter's end
    assert "threads: " in done.stdout and "gloo" not in done.stdout
    for method in ("at+kd", "fsp"):
        one = distributed_worker.loop(method)
        two = [torch.load(tmp_path / f"two-{method}-{rank}.pt") for rank in (0, 1)]
        for found in two:
            torch.testing.assert_close(found["model"], one.student.state_dict(), rtol=1e-5, atol=1e-7)
            for epoch, exact in zip(found["history"], one.history, strict=True):
                assert epoch["train_acc"] == exact["train_acc"] and epoch["test_acc"] == exact["test_acc"]
                assert epoch["loss"] == pytest.approx(exact["loss"], rel=1e-5) and epoch["lr"] == exact["lr"]
        assert all(torch.equal(two[0]["model"][name], value) for name, value in two[1]["model"].items())


def left(output):
    rows = rows_of(output)
    return rows, [torch.load(output / row["folder"] / "last.pt", weights_only=True) for row in rows]


@pytest.mark.slow
def test_one_process_writes_and_a_run_is_taken_up_to_the_same_bits(group, tmp_path):
    # without torchrun, which takes longer
    answer, logs = group.run(tmp_path, of_two(), flags=[*FLAGS, "--output", str(tmp_path / "whole")])
    said = "".join(logs)
    assert answer["statuses"] == [0, 0] and "Traceback" not in said, said
    assert said.count("method   at") == 1 and said.count("at epoch 2/2") == 1
    assert "2 processes of 16 images a step each, 32 together" in said
    rows, states = left(tmp_path / "whole")
    assert [row["method"] for row in rows] == ["teacher", "at"]

    flags = [*FLAGS, "--output", tmp_path / "killed"]
    status, said = torchrun(group, tmp_path, *flags, DIE_AFTER="1", DIE_BY="SIGKILL")
    assert status != 0 and "at epoch 1/2" not in said, said
    status, said = torchrun(group, tmp_path, *flags, "--resume")
    assert status == 0, said
    assert "goes on after epoch 1 of 2" in said and "teacher epoch" not in said
    for found, exact in zip(left(tmp_path / "killed")[1], states, strict=True):
        assert all(torch.equal(found["model"][name], value) for name, value in exact["model"].items())
        figures = [[(epoch["loss"], epoch["test_acc"]) for epoch in run["history"]] for run in (found, exact)]
        assert figures[0] == figures[1]
        momenta = [
            [state["momentum_buffer"] for state in run["optimizer"]["state"].values()]
            for run in (found, exact)
        ]
        assert all(map(torch.equal, *momenta))
        assert (
            found["teacher"].keys() == exact["teacher"].keys()
            if "teacher" in exact
            else "teacher" not in found
        )
        for name, value in exact.get("teacher", {}).items():
            assert torch.equal(found["teacher"][name], value)


@pytest.mark.parametrize(
    ("flags", "extra", "words"),
    [
        (["--lr", "1e30"], {}, "train.py: error: the loss is no longer finite"),
        (
            ["--batch-size", "40"],
            {},
            (
                "train.py: error: --batch-size is 40, but digits has parts of only 32 images for each of 2"
                " processes"
            ),
        ),
        ([], {"DIE_AFTER": "1", "DIE_BY": "SIGINT"}, "train.py: at stopped in epoch"),
    ],
    ids=["in training", "before", "Ctrl-C"],
)
def test_all_end_with_one_line(group, tmp_path, flags, extra, words):
    flags = [*FLAGS, "--output", tmp_path / "runs", *flags]
    if extra:
        done = start(2, "command", *flags, **extra)
        status, said = done.returncode, done.stderr
    else:
        status, said = torchrun(group, tmp_path, *flags)
    assert status != 0
    ours = [line for line in said.splitlines() if "train.py: " in line]
    assert len(ours) == 1 and ours[0].startswith(words), said
    assert "fastkd/training" not in said  # no traceback of ours; torchrun adds its own report


def test_a_step_of_all_processes_must_fit_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_LOADERS", dict(datasets._LOADERS))
    small_digits()
    monkeypatch.setattr("fastkd.training.distributed.share", lambda: (0, 4))
    settings = Settings(
        "at", "digits", student="resnet8", teacher="resnet8", output=tmp_path, overrides={"batch_size": 16}
    )
    assert (
        "processes=4" in Config(settings).teacher_path().name
        and Config(settings).identity("student")["processes"] == 4
    )
    with pytest.raises(
        UserError, match="--batch-size is 17, but digits has parts of only 16 images for each of 4 processes"
    ):
        Config(
            Settings(
                "at",
                "digits",
                student="resnet8",
                teacher="resnet8",
                output=tmp_path,
                overrides={"batch_size": 17},
            )
        )
