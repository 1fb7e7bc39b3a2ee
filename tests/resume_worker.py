"""Runs the command in processes of its own that can be killed, each forked from one that has imported everything.

Reads {"flags", "log", "kill_after", "die_at", "disk"} as JSON, a line a run; answers with its exit status (-9 when killed).
``kill_after``: seconds; ``die_at``: it kills itself within its so-manieth writing of a file; ``disk``: no file may become larger.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

from support_data import small_digits


def run(job: dict) -> int:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    left, fsync = job.get("die_at"), os.fsync

    def fatal(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    if left:
        os.fsync = fatal
    if job.get("disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["disk"], job["disk"]))
    status = main(job["flags"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def ended(child: int, kill_after: float | None) -> int:
    """The exit status of ``child``, killed after so many seconds if it still runs then."""
    end = time.monotonic() + (kill_after if kill_after is not None else 300)
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


main = runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"))["main"]
small_digits()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            os._exit(run(json.loads(line)))
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}\n".encode())
            os._exit(99)
    print(ended(child, json.loads(line).get("kill_after")), flush=True)
