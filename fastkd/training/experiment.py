"""One run from settings to a row of the table, in every one of its processes: teacher, student, records."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastkd import native
from fastkd.data.loader import Batches
from fastkd.errors import UserError
from fastkd.io.console import counted, say, screens
from fastkd.io.files import locked
from fastkd.methods import Definition, define
from fastkd.models import WeightsError, create_model, fingerprint, load_weights
from fastkd.training import attention_maps, distributed, results, resume, run_dir
from fastkd.training.config import Config
from fastkd.training.device import determinism
from fastkd.training.progress import Progress, clock
from fastkd.training.recipes import Recipe
from fastkd.training.run_dir import RunDir
from fastkd.training.run_summary import describe, ending, how_far, row_of
from fastkd.training.settings import Settings
from fastkd.training.signals import Interrupted
from fastkd.training.trainer import Trainer, evaluate, placed


def run(settings: Settings) -> dict[str, Any]:
    """Trains or loads the teacher if the method needs one, trains the student, adds its row to the table and
    returns it.

    Raises UserError for whatever the user can mend, Interrupted after Ctrl-C.
    """
    config = shared_config(settings)
    row, folder = distributed.from_first(lambda: resume.choose(config))
    if row is not None:
        done = f"row {row['no']} of {settings.output / 'results.csv'}, {row['reported_acc']} %"
        say(f"{config.settings.method}: {row['folder']} is finished, {done}")
        return dict(row)
    # the student's folder is there before the teacher's training begins, so that --resume finds the run
    # whenever it was killed
    with screens(), determinism(settings.deterministic), run_dir.opened(config, "student", folder) as student:
        say(describe(config))
        if config.device.type == "cpu" and not native.CPU.available:
            say(f"no compiled kernels, plain PyTorch instead: {native.CPU.reason}")
        teacher, accuracy = find_teacher(config) if config.method.needs_teacher else (None, None)
        return train(config, "student", student, config.method, teacher, accuracy)


def shared_config(settings: Settings) -> Config:
    """The first process decides, for instance what ``--precision auto`` is, and fetches the data; the others
    take its settings.
    """
    config = Config(settings) if distributed.leads() else None
    decided = distributed.from_first(lambda: settings if config is None else config.settings)
    config = config or Config(decided)
    distributed.meet()  # nothing is written before all are ready
    return config


def find_teacher(config: Config) -> tuple[nn.Module, float]:
    """The trained teacher and its test accuracy: from --teacher-checkpoint, an earlier run, or trained."""
    settings = config.settings
    path = settings.teacher_checkpoint or config.teacher_path()
    with teacher_lock(config, path):
        needed, folder = distributed.from_first(lambda: resume.choose_teacher(config, path))
        if needed:
            what = (
                f"{path} is not there yet; training it first"
                if folder is None
                else f"going on with its training in {folder}"
            )
            say(f"teacher: {what}")
            with run_dir.opened(config, "teacher", folder) as opened:
                train(config, "teacher", opened, define("baseline"), None, None)
    teacher = create_model(config.models.teacher, config.data.classes)
    weights, accuracy = distributed.from_first(lambda: load_teacher(config, teacher, path))
    teacher.load_state_dict(weights)
    return teacher, accuracy


@contextmanager
def teacher_lock(config: Config, path: Path) -> Iterator[None]:
    """Of several commands with one output the first trains the teacher, and the others wait for it here."""
    if config.settings.teacher_checkpoint is not None or not distributed.leads():
        yield
        return
    last_said = 0.0

    def waits() -> None:
        nonlocal last_said
        if not last_said:
            say(f"teacher: another process trains {path}; waiting for it")
        if time.monotonic() - last_said > 60:
            last_said = time.monotonic()
            distributed.busy()

    with locked(config.settings.output / f".{path.name}.lock", waits):
        yield


def load_teacher(config: Config, teacher: nn.Module, path: Path) -> tuple[dict[str, Any], float]:
    """Loads ``path`` into ``teacher``, says what it is, returns weights and accuracy. Raises UserError."""
    try:
        about = load_weights(teacher, path, say=say).get("config")
    except WeightsError as error:
        raise UserError(str(error)) from None
    found = about["identity"] if isinstance(about, dict) and isinstance(about.get("identity"), dict) else {}
    other = resume.differences(found, config.identity("teacher"))
    if other and config.settings.teacher_checkpoint is None:
        raise UserError(
            f"{path} is another teacher: {resume.in_words(other)}; move it away, or name it by"
            " --teacher-checkpoint"
        )
    batches = config.batches("teacher")[1]
    accuracy = evaluate(placed(teacher, config.device), batches, config.autocast())
    images = len(batches) * batches.batch_size if batches.drop_last else batches.count
    whole = "the test set" if images == batches.count else f"{images:,} images of the test set"
    how = ""
    if found:
        where = (
            f"{found.get('dataset')} by {found.get('recipe')}, {counted(found.get('epochs', 0), 'epoch')},"
            f" seed {found.get('seed')}"
        )
        how = f" (trained on {where}, {found.get('precision')}, {found.get('device')})"
    say(f"teacher: {config.models.teacher} from {path}{how}, {accuracy:.2f} % on {whole}")
    chance = 1 / config.data.classes
    # what guessing reaches, and its spread
    if accuracy / 100 <= chance + 2 * (chance * (1 - chance) / images) ** 0.5:
        say(
            f"teacher: warning: that is chance for {config.data.classes} classes: there is nothing to learn"
            " from it"
        )
    return {name: value.cpu() for name, value in teacher.state_dict().items()}, accuracy


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
    title, state, phases = run.config["trained"], run.state or {}, config.phases(method)
    run.begin([name for name, _, _ in phases], None if teacher is None else fingerprint(teacher))
    student, batches = config.new_model(role), config.batches(role)
    for phase in phases[run.finished_phases :]:
        name, recipe, main = phase[0], phase[1], phase[0] == "main"
        trainer = phase_trainer(config, role, phase, student, teacher, batches)
        label = title if main else f"{title} {name}"
        if state.get("phase") == name:
            run.restore(trainer)
            say(f"{label}: {run.folder} goes on after epoch {len(trainer.history)} of {recipe.epochs}")
        elif run.state is None and name == phases[0][0]:
            say(f"{label}: begins in {run.folder}")
        progress = Progress(label, trainer.steps, len(trainer.history) * len(trainer.batches))
        try:
            for epoch in trainer.fit(progress):
                run.save_epoch(name, trainer)
                progress.line(
                    f"{label} epoch {epoch}/{recipe.epochs}  {trainer.summary()}  {clock(progress.left())}"
                    " left"
                )
            if main:
                row = distributed.from_first(partial(record, config, role, run, trainer, teacher_acc))
        except KeyboardInterrupt as stop:
            line = how_far(label, name, trainer, run.folder, config.settings.output)
            raise Interrupted(line, getattr(stop, "status", 130)) from None
        finally:
            progress.close()
    if run.writes and "no" in row:
        # after the row: nothing that fails here can lose it
        if role == "student" and config.settings.pictures:
            trainer.student.load_state_dict(trainer.weights()[0])
            attention_maps.draw(config, run.folder, trainer.student, teacher)
        say(ending(config, role, row, results.COLUMNS[:11], run.folder))
    return row


def phase_trainer(
    config: Config,
    role: str,
    phase: tuple[str, Recipe, Definition],
    student: nn.Module,
    teacher: nn.Module | None,
    batches: tuple[Batches, Batches],
) -> Trainer:
    """What trains ``student`` in ``phase`` (of ``config.phases``); only the main one is tested."""
    name, recipe, method = phase
    train, test = copy.copy(batches[0]), batches[1] if name == "main" else None
    train.stream = role if name == "main" else f"{role} {name}"
    taught = None if teacher is None else placed(teacher, config.device)
    distillation = config.distillation(role, placed(student, config.device), taught, method)
    return Trainer(distillation, train, test, recipe, config.autocast(), config.compiled, config.captured)


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
