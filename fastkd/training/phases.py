"""One training in its phases, from the networks to a row of the table."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastkd.data.loader import AnyBatches
from fastkd.errors import UserError
from fastkd.io.console import say
from fastkd.methods import Definition
from fastkd.models import fingerprint
from fastkd.training import attention_maps, distributed, results
from fastkd.training.config import Config
from fastkd.training.evaluation import placed
from fastkd.training.outcome import ending, how_far, row_of
from fastkd.training.progress import Progress, clock
from fastkd.training.recipes import Recipe
from fastkd.training.run_dir import RunDir
from fastkd.training.signals import Interrupted
from fastkd.training.step import Shared
from fastkd.training.trainer import Trainer, Wanted


def train(
    config: Config,
    role: str,
    run: RunDir,
    method: Definition,
    teacher: nn.Module | None,
    teacher_acc: float | None,
) -> dict[str, Any]:
    """Trains the "student" or the "teacher" (``role``) in the folder of ``run``, from its state if it has
    one, and records it.

    The checkpoint, the best weights and the log are on disk after every epoch. Raises UserError, Interrupted.
    """
    steps = training(config, role, run, method, teacher, teacher_acc, config.batches(role))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return dict(end.value)


def training(
    config: Config,
    role: str,
    run: RunDir,
    method: Definition,
    teacher: nn.Module | None,
    teacher_acc: float | None,
    batches: tuple[AnyBatches, AnyBatches],
    place: int | None = None,
    title: str = "",
) -> Generator[Wanted, Shared | None, dict[str, Any]]:
    """:func:`train` with ``batches``, which stops before each step: see :meth:`Trainer.train_steps`.

    ``place``: which of the students that are trained side by side it is; the first has the bar on a terminal.
    ``title``: what its lines begin with.
    """
    title, state, phases = title or run.config["trained"], run.state or {}, config.phases(method)
    run.begin([name for name, _, _ in phases], None if teacher is None else fingerprint(teacher))
    student = config.new_model(role)
    for phase in phases[run.finished_phases :]:
        name, recipe, main = phase[0], phase[1], phase[0] == "main"
        trainer = phase_trainer(config, role, phase, student, teacher, batches, fold=place is None)
        label = title if main else f"{title} {name}"
        if state.get("phase") == name:
            run.restore(trainer)
            say(f"{label}: {run.folder} goes on after epoch {len(trainer.history)} of {recipe.epochs}")
        elif run.state is None and name == phases[0][0]:
            say(f"{label}: begins in {run.folder}")
        progress = Progress(
            label, trainer.steps, len(trainer.history) * len(trainer.batches), bar=place in (None, 0)
        )
        try:
            for epoch in range(len(trainer.history) + 1, recipe.epochs + 1):
                if place is None:
                    trainer.train_epoch(epoch, progress)
                else:
                    yield from trainer.epoch_steps(epoch, progress)
                run.save_epoch(name, trainer)
                progress.line(
                    f"{label} epoch {epoch}/{recipe.epochs}  {trainer.summary()}  {clock(progress.left())}"
                    " left"
                )
                for text in trainer.reading.lines():
                    progress.line(f"{label} epoch {epoch}: {text}")
            if main:
                row = distributed.from_first(partial(record, config, role, run, trainer, teacher_acc))
        except KeyboardInterrupt as stop:
            line = how_far(label, name, trainer, run.folder, config.settings.output)
            raise Interrupted(line, getattr(stop, "status", 130)) from None
        finally:
            progress.close()
    if run.writes and "no" in row:
        if role == "student" and config.settings.pictures and attention_maps.available():
            trainer.student.load_state_dict(trainer.weights()[0])
            try:
                attention_maps.draw(
                    run.folder,
                    row,
                    config.data,
                    (config.normalization(), config.teacher_normalizations[0] or config.normalization()),
                    trainer.student,
                    teacher[0] if isinstance(teacher, nn.ModuleList) else teacher,
                    [config.points["student"], config.points["teacher"]],
                    [config.side("student"), config.side("teacher")],
                )
            except UserError as error:  # the run is finished, and its row is in the table
                say(str(error))
        say(ending(config, role, row, run.folder))
    return row


def phase_trainer(
    config: Config,
    role: str,
    phase: tuple[str, Recipe, Definition],
    student: nn.Module,
    teacher: nn.Module | None,
    batches: tuple[AnyBatches, AnyBatches],
    fold: bool = True,
) -> Trainer:
    """What trains ``student`` in ``phase`` (of ``config.phases``); only the main one is tested. ``fold``:
    whether the teacher is folded here.
    """
    name, recipe, method = phase
    train, test = copy.copy(batches[0]), batches[1] if name == "main" else None
    train.stream = role if name == "main" else f"{role} {name}"
    train.drop_last = config.drops_last(role)
    taught = None if teacher is None else placed(teacher, config.device)
    distillation = config.distillation(
        role, placed(student, config.device), taught, method, fold=fold, train_images=InOrder(train)
    )
    return Trainer(distillation, train, test, recipe, config.autocast(), config.compiled, config.captured)


class InOrder:
    """All images of ``batches`` in their order, from the first one on for each teacher that is measured."""

    def __init__(self, batches: AnyBatches):
        self.batches = copy.copy(batches)
        self.batches.drop_last = False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches.test()


def record(
    config: Config, role: str, run: RunDir, trainer: Trainer, teacher_acc: float | None
) -> dict[str, Any]:
    """Adds the run to the table and returns its row, which has no number where that failed. Raises UserError
    for a student's.
    """
    if role == "teacher":
        run.write_weights(config.teacher_path(), *trainer.weights())
    row = row_of(config, role, run, trainer, teacher_acc)
    try:
        return results.append(config.settings.output, row)
    except UserError as error:
        if role == "student":
            raise
        # its weights are there: no reason to keep its student waiting
        say(f"{run.config['trained']}: {error}")
        return row
