"""Several processes do what one does, end together when one fails, and are found however they were started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--method", "at", "--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--batch-size", "16", "--device", "cpu"]
FLAGS += ["--epochs", "2", "--recipe", "hankyul2", "--no-pictures"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")


def of_two(**variables):
    """What each of two processes of one machine finds in its environment."""
    return [{"RANK": str(i), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free", **variables} for i in (0, 1)]


@pytest.fixture(scope="module")
def worker():
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "FASTKD_BACKEND"):
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "tests" / "processes_worker.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def start(worker, tmp_path):
    """Runs a job of tests/processes_worker.py; returns its answer and what each process printed."""

    def run(environment, **job):
        logs = [tmp_path / f"log-{rank}" for rank in range(len(environment))]
        job = {**job, "environment": environment, "logs": list(map(str, logs))}
        worker.stdin.write(json.dumps(job, default=str) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        return answer, [log.read_text() for log in logs]

    return run


def ours(logs):
    return [line for log in logs for line in log.splitlines() if line.startswith("train.py: ") or "Traceback" in line]


def test_parameters_without_a_gradient_in_any_process_have_none(start, tmp_path):
    answer, logs = start(of_two(), call="gradients", arguments=[tmp_path / "grads"])
    assert answer["statuses"] == [0, 0], logs
    for rank in (0, 1):
        found = torch.load(tmp_path / f"grads-{rank}.pt")
        assert found[3] is None
        assert [grad.tolist() for grad in found[:3]] == [[5.5, 5.5], [0.5, 0.5], [5.0, 5.0]]


def test_a_classifier_that_the_loss_never_reaches_is_not_decayed(start, tmp_path):
    answer, logs = start(of_two(), call="initialization", arguments=[tmp_path / "two"])
    assert answer["statuses"] == [0, 0], logs
    one = distributed_worker.loop("fsp", alone=True, epochs=3, weight_decay=0.5)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two-{rank}.pt")
        assert torch.equal(two["model"]["fc.weight"], one.student.fc.weight) and two["momenta"] == len(one.optimizer.state)
        torch.testing.assert_close(two["model"], one.student.state_dict(), rtol=1e-5, atol=1e-7)


PLACES = {
    "the first, in a step": (0, "fastkd.training.step:Step._forward", 2),
    "another, in a step": (1, "fastkd.training.step:Step._forward", 2),
    "another, after the last step": (1, "fastkd.training.batches:Batches.sizes", 2),
    "another, in the test": (1, "fastkd.training.loop:evaluate", 1),
    "another, in its plan": (1, "fastkd.training.plan:Plan.__init__", 1),
    "another, in its loop": (1, "fastkd.training.loop:Loop.load", 1),
    "the first, between epochs": (0, "fastkd.training.run:keep_best", 1),
}


def fails(rank, place, call, error="UserError"):
    return {"fault": {"rank": rank, "place": place, "call": call, "error": error}}


@pytest.mark.parametrize("what", ["a loss not finite, seen in mid-epoch", *PLACES])
def test_a_failure_of_one_process_ends_all_at_once_with_one_line(start, tmp_path, what):
    flags, words = [*FLAGS, "--method", "baseline", "--output", tmp_path / "runs"], "planted"
    if what in PLACES:
        job = fails(*PLACES[what])
    else:
        flags, job, words = [*flags, "--lr", "1e30"], {"terminal": True}, "the loss is no longer finite in epoch 1"
    answer, logs = start(of_two(), flags=list(map(str, flags)), **job)
    assert answer["statuses"] in ([2, 0], [2, 1]), (answer, logs)
    assert len(ours(logs)) == 1 and ours(logs)[0].startswith(f"train.py: error: {words}"), logs
    if what in PLACES:
        assert answer["seconds"] < 10  # well below one where nothing else runs; the group's timeout is half an hour


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
    answer, logs = start(of_two(), flags=flags, **fails(rank, "fastkd.training.step:Step._forward", 2, error))
    assert answer["statuses"] == statuses, (answer, logs)
    assert words in ours(logs) and len(ours(logs)) == 1 + (rank == 1), logs
    assert answer["seconds"] < 10
