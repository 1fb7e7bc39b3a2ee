"""Run by child_process.py. Reads {"code", "argv", "env", "cwd", "files"} as JSON, a line for each job;
answers with its exit status. Each job is a process forked from this one; ``files`` take its stdout and
stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch  # noqa: F401 - for those that are forked

given = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)}
OTHERS = [path for path in sys.path[1:] if os.path.abspath(path) not in given]


def next_job() -> dict[str, Any]:
    """Returns in each forked process; the one that forks ends with stdin."""
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
# as -c has it
sys.path[:] = ["", *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep)), *OTHERS]
exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
