"""Run by child_process.py. Reads {"code", "argv", "env", "cwd", "files"} as JSON, a line a job; answers with
its exit status. Each job is a process forked from this one; ``files`` take its stdout and stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch  # noqa: F401 - for those that are forked


def next_job() -> dict[str, Any]:
    """Returns in a new process alone."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


job = next_job()
for number, path in enumerate((os.devnull, *job["files"])):
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.dup2(file, number)
    os.close(file)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
sys.argv = job["argv"]
sys.path[:0] = [""]  # as -c has it; the folder of this file stays
exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
