"""What a run says at its end, and the command that repeats it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.training import distributed
from fastkd.training.console import counted
from fastkd.training.plan import Plan
from fastkd.training.progress import clock
from fastkd.training.settings import environment

COMMAND = "command.sh"
INSTALLED = "fastkd-train"


def program() -> str:
    """What the user called: the installed command, or the script in a clone."""
    # torchrun starts the installed command as a module, "cli"
    return INSTALLED if Path(sys.argv[0]).stem in (INSTALLED, "cli") else "train.py"


def command(plan: Plan) -> str:
    """The command of this run, quoted for a shell, with what was chosen for it by name: ``auto`` may choose otherwise tomorrow.

    Every choice that changes bits is in it, be it a flag or a variable of the environment.
    """
    settings, taught = plan.settings, plan.method.needs_teacher
    flags: dict[str, Any] = {
        "method": settings.method,
        "dataset": plan.data.name,
        "data": settings.data,
        "teacher": plan.models.teacher if taught else None,
        "student": plan.models.student,
        "teacher_checkpoint": settings.teacher_checkpoint if taught else None,
        "recipe": plan.recipe_name,
        **settings.overrides,
        "option": plan.options(),
        "seed": settings.seed,
        "teacher_seed": plan.teacher_seed,
        "device": plan.device.type,
        "precision": settings.precision,
        "deterministic": settings.deterministic or None,
        "compile": plan.compiled,
        "cuda_graph": plan.captured if plan.device.type == "cuda" and plan.processes == 1 else None,
        "output": settings.output,
        "pictures": None if settings.pictures else False,
    }
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    return shlex.join([*environment(), *_start(plan, script), *(word for name, value in flags.items() for word in _words(name, value))])


def _start(plan: Plan, script: str) -> list[str]:
    """What starts the script, or the installed command: torchrun with as many processes, also where srun or mpirun started them."""
    installed = program() == INSTALLED
    if plan.processes == 1:
        return [INSTALLED] if installed else ["python", script]
    launch = distributed.launched()
    nodes = 1 if launch is None else launch.nodes
    where = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
    return [
        "torchrun",
        *where,
        "--nproc-per-node",
        str(plan.processes // nodes),
        *(["-m", "fastkd.training.cli"] if installed else [script]),
    ]


def _words(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, list):
        return [word for each in value for word in (flag, each)]
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def command_file(plan: Plan, role: str) -> str:
    """A shell script of :func:`command`, with what the weights depend on and no flag says. It takes more flags, such as --resume."""
    versions = f"fastkd {fastkd.__version__}, torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"
    of = (
        "trains this teacher where it is not there, then its student"
        if role == "teacher"
        else "trains this student, its teacher too if it is not there"
    )
    launch = distributed.launched()
    if launch is not None and launch.nodes > 1:
        versions += f"; on each of {launch.nodes} machines, which --rdzv-endpoint brings together"
    return f'#!/bin/sh\n# {of}; {versions}\ncd {shlex.quote(os.getcwd())} || exit\n{command(plan)} "$@"\n'


def ending(plan: Plan, role: str, row: Mapping[str, Any], columns: Iterable[str], folder: Path) -> str:
    """The row, the files, and for a student the command that repeats it."""
    title = row["method"]
    told = f"best {row['acc']} % (epoch {row['epoch']}), last {row['last_acc']} %, {clock(row['seconds'])}"
    lines = [f"{title}: {told}; {plan.recipe_name} reports the {plan.recipe.report}: {row['reported_acc']} %"]
    lines.append(f"{title}: row {row['no']} of {plan.settings.output / 'results.csv'}, weights in {folder}")
    if role == "teacher":
        return "\n".join(lines)
    names = list(columns)
    widths = [max(len(name), len(str(row[name]))) for name in names]
    lines += [
        "  ".join(str(word).ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in (names, [row[name] for name in names])
    ]
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    lines += [f"files    {', '.join(files)}", f"again    {command(plan)}"]
    return "\n".join(lines)
