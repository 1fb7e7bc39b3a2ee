"""Python code in processes of its own, forked from one that has imported PyTorch, which takes seconds.

fastkd is not imported there: what its import does, and what the environment makes of it, is for the code.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = Path(__file__).with_name("fork_server.py")
SECONDS = 300


@functools.cache
def _server(owner: int) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # it is read when PyTorch is imported
    server = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=pipe,
        stdout=pipe,
        text=True,
        env=environment,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # and what it has forked
        server.wait()


def python(
    code: str, *arguments: object, cwd: str | os.PathLike[str] | None = None, **env: str | None
) -> subprocess.CompletedProcess[str]:
    """``python -c code *arguments`` with one thread, where Triton does not interpret; ``env``: variables
    beyond those of this process, None for one that is not to be there. Raises TimeoutExpired, which has what
    was printed.
    """
    wanted = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **env}
    variables = {name: value for name, value in wanted.items() if value is not None}
    command, folder = [sys.executable, "-c", code, *map(str, arguments)], str(cwd or os.getcwd())
    if not hasattr(os, "fork"):
        return subprocess.run(
            command, capture_output=True, text=True, env=variables, cwd=folder, timeout=SECONDS
        )
    server = _server(os.getpid())
    with tempfile.TemporaryDirectory() as place:
        files = [os.path.join(place, name) for name in ("out", "err")]
        job = {"code": code, "argv": command[1:2] + command[3:], "env": variables, "files": files}
        assert server.stdin and server.stdout
        with contextlib.suppress(BrokenPipeError):  # its stdout then tells the same
            server.stdin.write(json.dumps({**job, "cwd": folder}) + "\n")
            server.stdin.flush()
        answered = bool(select.select([server.stdout], [], [], SECONDS)[0])
        answer = server.stdout.readline() if answered else ""
        if not answer:  # the next one gets a new server
            _server.cache_clear()
        if not answered:
            _end(server)
            printed = (Path(file).read_text() if os.path.exists(file) else "" for file in files)
            raise subprocess.TimeoutExpired(command, SECONDS, *printed)
        if not answer:
            raise RuntimeError(f"{SERVER.name} ended with status {server.wait()}")
        return subprocess.CompletedProcess(command, int(answer), *(Path(file).read_text() for file in files))


RANKS = """
import importlib, os, sys
main = importlib.import_module(sys.argv[1]).main
children = []
for rank in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        os.environ["RANK"] = str(rank)
        main(*sys.argv[3:])
        sys.exit()
    children.append(child)
sys.exit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))
"""


def ranks(count: int, module: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """``main(*arguments)`` of a module of this folder in ``count`` processes, each with its RANK in the
    environment; the module is imported once.
    """
    path = os.pathsep.join(filter(None, [str(SERVER.parent), os.environ.get("PYTHONPATH")]))
    return python(RANKS, module, count, *arguments, **env, WORLD_SIZE=str(count), PYTHONPATH=path)
