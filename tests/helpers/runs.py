"""Runs of the command in processes that are killed, and functions in groups of processes; what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from record_files import rows_of

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process of its own with one thread, which gets a job as a line of JSON and answers with a line."""

    def __init__(self, script):
        paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
        }
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "FASTKD_BACKEND"):
            environment.pop(name, None)
        command = [sys.executable, str(ROOT / "tests" / "helpers" / script)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, job):
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


class Nursery(Worker):
    """Starts the command in processes that can be killed."""

    def __init__(self):
        super().__init__("resume_worker.py")

    def run(self, output, flags, **job):
        """(exit status, what it printed). Keywords: see resume_worker.py."""
        log = output.with_suffix(".log")
        status = self.ask({"flags": [*flags, "--output", str(output)], "log": str(log), **job})
        return status, log.read_text()

    def taken_up(self, output, flags, killers):
        """Runs until a whole run is through, each of ``killers`` (keywords of ``run``) on the way; returns
        how many were killed.
        """
        kills, resume = 0, []
        for killer in [*killers, {}]:
            status, text = self.run(output, [*flags, *resume], **killer)
            if status == 2 and text.endswith("is finished\n"):  # killed after all was done
                return kills
            if status == 2 and "without --resume it begins" in text:  # killed before there was anything
                status, text = self.run(output, flags, **killer)
            assert status in (0, -signal.SIGKILL), text
            if status == 0:
                return kills
            kills, resume = kills + 1, ["--resume"]
        raise AssertionError("the last one is not killed")


class Group(Worker):
    """Starts groups of processes; see processes_worker.py."""

    def __init__(self):
        super().__init__("processes_worker.py")

    def run(self, folder, environment, **job):
        """(its answer, what each process printed). ``environment``: of each process."""
        logs = [folder / f"log-{rank}" for rank in range(len(environment))]
        answer = self.ask({**job, "environment": environment, "logs": logs})
        return answer, [log.read_text() for log in logs]


def of_two(count=2, **variables):
    """The environment variables of each of two processes, or of ``count``, on one machine."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "free", **variables}
    return [{"RANK": str(i), **common} for i in range(count)]


def ours(logs):
    """The lines of the command, and tracebacks, in what each process printed."""
    return [
        line
        for log in logs
        for line in log.splitlines()
        if line.startswith("train.py: ") or "Traceback" in line
    ]


def bits(value):
    """Nested tensors as something to compare, without what a clock said."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        clocked = ("seconds", "images_per_second", "config", "elapsed", "started")
        return {key: bits(part) for key, part in value.items() if key not in clocked}
    return [bits(part) for part in value] if isinstance(value, list) else value


def load(path):
    return torch.load(path, weights_only=True)


def check_same(output, reference):
    ours, theirs = rows_of(output), rows_of(reference)
    clocked = ("start_time", "seconds", "images_per_second", "folder")
    assert [{k: v for k, v in row.items() if k not in clocked} for row in ours] == [
        {k: v for k, v in row.items() if k not in clocked} for row in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        for name in ("last.pt", "best.pt"):
            assert bits(load(output / one["folder"] / name)) == bits(
                load(reference / other["folder"] / name)
            ), name
    for one, other in zip(output.glob("teachers/*.pt"), reference.glob("teachers/*.pt"), strict=True):
        assert one.name == other.name and bits(load(one)) == bits(load(other))
    assert not [path for row in ours for path in (output / row["folder"]).glob(".*.tmp")]
