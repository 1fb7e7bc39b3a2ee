"""Starts groups of processes as srun or mpirun do: by environment variables, without torchrun.

They are forked from a process that has imported everything, which takes a fraction of the time of new ones.
A job is a line of JSON: ``flags`` of train.py, or ``call``, a function of this file with its ``arguments``;
``environment``, a dict of variables for each process; ``logs``, a file for each; ``fault``: {"rank", "place",
"call", "error"} raises that error in one process (rank null: in all), or sends it that signal, when the
function ``place`` is called for the ``call``-th time, from 1. The answer has the exit ``statuses``
(-9: killed after ``limit`` seconds) and ``seconds``: from the fault, else from the start, to the last one's
end.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import distributed_worker
import imported_ahead  # noqa: F401
import torch
import toy_methods
from distributed_worker import loop
from methods_worker import every_method  # noqa: F401 - a call
from support_data import small_digits
from teacher_cases import buffers_of_processes  # noqa: F401 - a call

from fastkd.training import Interrupted, UserError, collectives, distributed
from fastkd.training.progress import Progress

ERRORS: dict[str, type[BaseException]] = {
    "UserError": UserError,
    "RuntimeError": RuntimeError,
    "MemoryError": MemoryError,
    "Interrupted": Interrupted,
}


def plant(fault: dict[str, Any], moment: Path) -> None:
    """Makes a function fail at a call that is counted from 1, and writes down when."""
    module, _, name = fault["place"].partition(":")
    *holders, name = name.split(".")
    holder: Any = importlib.import_module(module)
    for part in holders:
        holder = getattr(holder, part)
    whole, left = getattr(holder, name), fault["call"]

    def failing(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            moment.write_text(str(time.monotonic()))
            if fault["error"].startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, fault["error"]))
            else:
                raise ERRORS[fault["error"]]("planted")
        return whole(*args, **options)

    setattr(holder, name, failing)


def as_on_a_terminal() -> None:
    """The first process reads its figures after every step, not once a second where stderr is a terminal."""

    def advance(self: Progress, describe: Any) -> None:
        if not self.silent:
            describe()

    Progress.advance = advance  # type: ignore[method-assign]


def initialization(path: str) -> None:
    """FSP's first phase, whose loss does not reach the classifier, with a weight decay that would show."""
    with distributed.group("cpu"):
        made = loop("fsp", alone=True, epochs=3, weight_decay=0.5)
        torch.save(
            {"model": made.student.state_dict(), "momenta": len(made.optimizer.state)},
            f"{path}-{distributed.share()[0]}.pt",
        )


def gradients(path: str) -> None:
    """Adds gradients of four parameters: of the first in all processes, of the others in one or in none."""
    with distributed.group("cpu"):
        rank = distributed.share()[0]
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
        for i, parameter in enumerate(parameters):
            if i == 0 or i == rank + 1:
                parameter.grad = torch.full((2,), 10.0**rank)
        collectives.add_gradients(parameters, 0.5)
        torch.save([parameter.grad for parameter in parameters], f"{path}-{rank}.pt")


def banks(path: str) -> None:
    """A method that keeps a row for each image of all processes, and what one process makes of rows that are
    not divided evenly.
    """
    with distributed.group("cpu"):
        rank = distributed.share()[0]
        rows = torch.arange(5).tensor_split(2)[rank]
        joined = collectives.joined_rows((rows, (rows[:, None] * 2.0,)), 5)
        made = loop(toy_methods.define("bank"))
        crd = loop("crd").distillation.methods["crd"].function.state_dict()
        torch.save(
            {"joined": joined, "bank": made.distillation.methods["bank"].bank, "crd": crd},
            f"{path}-{rank}.pt",
        )


def answers(path: str) -> None:
    """What the first process finds after a while, as each process receives it."""
    with distributed.group("cpu"):
        found = distributed.from_first(lambda: [distributed.busy(), distributed.busy(), 7][-1])
        torch.save(found, f"{path}-{distributed.share()[0]}.pt")


def torchrun(*arguments: str) -> None:
    """The command of distributed_worker.py in two processes of torchrun, forked and not started anew."""
    from torch.distributed import run

    launch = run.elastic_launch

    def forked(config: Any, entrypoint: object) -> Any:
        config.start_method = "fork"
        return lambda *_: launch(config, distributed_worker.main)()

    run.elastic_launch = forked
    sys.argv[1:] = ["command", *arguments]
    run.main(["--standalone", "--nproc-per-node", "2", "distributed_worker.py"])


def child(job: dict[str, Any], rank: int) -> int:
    log = os.open(job["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["environment"][rank])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    if job.get("terminal"):
        as_on_a_terminal()
    fault = job.get("fault")
    if fault and fault["rank"] in (None, rank):
        plant(fault, Path(job["logs"][0] + ".moment"))
    try:
        if "call" in job:
            globals()[job["call"]](*job["arguments"])
            return 0
        return main(job["flags"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        os.write(2, f"Traceback: {error!r}\n".encode())
        return 99


def run(job: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for variables in job["environment"]:
        if variables.get("MASTER_PORT") == "free":
            variables["MASTER_PORT"] = port
    begun, children = time.monotonic(), []
    for rank in range(len(job["environment"])):
        one = os.fork()
        if one == 0:
            status = child(job, rank)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(one)
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for one in children:
            found = os.waitpid(one, os.WNOHANG) if one not in statuses else (0, 0)
            if found != (0, 0):
                statuses[one] = os.waitstatus_to_exitcode(found[1])
            elif one not in statuses and time.monotonic() > begun + job.get("limit", 60):
                os.kill(one, signal.SIGKILL)
        time.sleep(0.005)
    moment = Path(job["logs"][0] + ".moment")
    since = float(moment.read_text()) if moment.exists() else begun
    return {"statuses": [statuses[one] for one in children], "seconds": time.monotonic() - since}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # which imports most of what takes seconds; tensorboard is the rest
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    for name in ("torch.distributed.nn", "torch.utils.tensorboard"):
        with suppress(ImportError):
            importlib.import_module(name)
    main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "train.py"))["main"]
    small_digits()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
