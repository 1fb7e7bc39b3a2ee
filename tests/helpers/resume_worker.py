"""Runs the command in processes of its own that can be killed, each forked from one that has imported
everything.

Reads {"flags", "log", "kill_after", "since", "die_at", "disk"} as JSON, a line for each run; answers with its
exit status (-9 when killed). ``kill_after``: seconds since its log holds ``since``; ``die_at``: it kills
itself during the write of a file that has this number, from 1; ``disk``: no file may become larger.
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

import imported_ahead  # noqa: F401
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


def ended(child: int, log: Path, kill_after: float | None = None, since: str = "", **_: object) -> int:
    """The exit status of ``child``, killed if it runs so many seconds after ``since`` was in its log."""
    begun, limit = None, time.monotonic() + 300
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if begun is None and since in log.read_text():
            begun = time.monotonic()
        if time.monotonic() > (limit if begun is None or kill_after is None else begun + kill_after):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"))["main"]
small_digits()
for line in sys.stdin:
    job = json.loads(line)
    Path(job["log"]).write_text("")
    child = os.fork()
    if child == 0:
        try:
            os._exit(run(job))
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}\n".encode())
            os._exit(99)
    print(ended(child, **{**job, "log": Path(job["log"])}), flush=True)
