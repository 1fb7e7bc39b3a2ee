"""The loop of one phase of a training, the same in the process that leads and in those that follow it."""

from __future__ import annotations

import copy
import signal
import sys
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import nn

from fastkd.methods import Definition, define
from fastkd.models import create_model
from fastkd.training import distributed
from fastkd.training.batches import Batches
from fastkd.training.determinism import determinism
from fastkd.training.errors import UserError
from fastkd.training.loop import Loop, placed
from fastkd.training.plan import Plan
from fastkd.training.progress import Progress
from fastkd.training.recipes import Recipe
from fastkd.training.settings import Settings
from fastkd.training.signals import end_late


def phase_loop(plan: Plan, role: str, phase: tuple[str, Recipe, Definition], student: nn.Module, teacher: nn.Module | None,
               batches: tuple[Batches, Batches]) -> Loop:  # fmt: skip
    """What trains ``student`` in ``phase`` (of ``plan.phases``); only the main one is tested."""
    name, recipe, method = phase
    train, test = copy.copy(batches[0]), batches[1] if name == "main" else None
    train.stream = role if name == "main" else f"{role} {name}"
    distillation = plan.distillation(role, placed(student, plan.device), teacher, method)
    return Loop(distillation, train, test, recipe, plan.autocast(), plan.compiled, plan.captured)


def lead(loop: Loop, role: str, phase: str) -> None:
    """Has the other processes make the same loop, in the same state."""
    if distributed.share()[1] > 1:
        teacher = None if loop.teacher is None else loop.teacher.state_dict()
        distributed.order({"role": role, "phase": phase, "state": loop.state(), "teacher": teacher})
        distributed.synchronize()


def lead_epoch(loop: Loop, epoch: int, progress: Progress) -> None:
    distributed.order(epoch)
    loop.train_epoch(epoch, progress)


def follow() -> None:
    """Trains as the first process orders, until it says no more. Prints nothing, writes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process stops, and torchrun ends us
    end_late()
    try:
        with ExitStack() as stack:
            _follow(stack)
    except (UserError, RuntimeError) as error:
        if not isinstance(error, UserError) and not distributed.lost(error):
            raise
        sys.exit(1)  # the first process knows and says why


def _follow(stack: ExitStack) -> None:
    """Orders are a run's settings, then what makes a loop, then numbers of its epochs; "wait" is none yet."""
    plan: Plan
    loop: Loop
    while (order := distributed.receive()) is not None:
        with suppress(UserError):  # the first process has it too, says so, and ends us
            if isinstance(order, Settings):
                plan = distributed.together(partial(Plan, order))
                stack.enter_context(determinism(order.deterministic))
            elif isinstance(order, dict):
                loop = distributed.together(partial(_loop, plan, order))
            elif order != "wait":
                loop.train_epoch(order, Progress("", 0, silent=True))


def _loop(plan: Plan, order: dict[str, Any]) -> Loop:
    role = order["role"]
    method = plan.method if role == "student" else define("baseline")
    phase = next(phase for phase in plan.phases(method) if phase[0] == order["phase"])
    teacher = None
    if order["teacher"] is not None:
        teacher = create_model(plan.models.teacher, plan.data.classes)
        teacher.load_state_dict(order["teacher"])
    loop = phase_loop(plan, role, phase, plan.new_model(role), teacher, plan.batches(role))
    loop.load(order["state"])
    return loop
