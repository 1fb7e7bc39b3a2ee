"""The command that repeats a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd.io.console import counted
from fastkd.training.config import Config
from fastkd.training.launch import launched
from fastkd.training.settings import FOLDERS, POINTS, environment

COMMAND = "command.sh"
INSTALLED = "fastkd-train"


def program() -> str:
    """What the user called: the installed command, or the script in a clone."""
    # torchrun starts the installed command as a module, "cli"
    return INSTALLED if Path(sys.argv[0]).stem in (INSTALLED, "cli") else "train.py"


def command(config: Config) -> str:
    """The command of this run, quoted for a shell, with what was chosen for it by name: ``auto`` may choose
    otherwise tomorrow.

    Every choice that changes bits is in it, be it a flag or a variable of the environment.
    """
    settings, taught, teachers = config.settings, config.method.needs_teacher, config.all_teachers
    flags: dict[str, Any] = {
        "method": settings.method,
        "dataset": config.data.name,
        "data": settings.data,
        "teacher": [name for name, _ in teachers] if taught else None,
        "student": config.models.student,
        "teacher_checkpoint": [str(file) for _, file in teachers if file] if taught else None,
        "join_teachers": config.join_teachers if taught and len(teachers) > 1 else None,
        "student_checkpoint": settings.student_checkpoint,
        "plugin": list(settings.plugins),
        **{name: getattr(settings, name) for name in (*POINTS, *FOLDERS)},
        **config.words_of_teachers(),
        "recipe": config.recipe_name,
        **settings.overrides,
        "option": config.options(),
        "seed": settings.seed,
        "teacher_seed": config.teacher_seed,
        "device": config.device.type,
        "precision": settings.precision,
        "deterministic": settings.deterministic or None,
        "compile": config.compiled,
        "cuda_graph": config.captured if config.device.type == "cuda" and config.processes == 1 else None,
        "output": settings.output,
        "pictures": None if settings.pictures else False,
    }
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    words = [word for name, value in flags.items() for word in _words(name, value)]
    return shlex.join([*environment(), *_start(config, script), *words])


def _start(config: Config, script: str) -> list[str]:
    """What starts the script, or the installed command: torchrun with as many processes, also where srun or
    mpirun started them.
    """
    installed = program() == INSTALLED
    if config.processes == 1:
        return [INSTALLED] if installed else ["python", script]
    launch = launched()
    nodes = 1 if launch is None else launch.nodes
    where = ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes)]
    return [
        "torchrun",
        *where,
        "--nproc-per-node",
        str(config.processes // nodes),
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


def command_file(config: Config, role: str) -> str:
    """A shell script of :func:`command`, with what the weights depend on and no flag says. It takes more
    flags, such as --resume.
    """
    versions = (
        f"fastkd {fastkd.__version__}, torch {torch.__version__},"
        f" {counted(torch.get_num_threads(), 'thread')}"
    )
    of = (
        "trains this teacher where it is not there, then its student"
        if role == "teacher"
        else "trains this student, its teacher too if it is not there"
    )
    launch = launched()
    if launch is not None and launch.nodes > 1:
        versions += f"; on each of {launch.nodes} machines, which --rdzv-endpoint brings together"
    return f'#!/bin/sh\n# {of}; {versions}\ncd {shlex.quote(os.getcwd())} || exit\n{command(config)} "$@"\n'
