"""The teacher of a run: found, waited for, or trained first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.errors import TeacherError, UserError
from fastkd.io.console import counted, say
from fastkd.io.files import locked
from fastkd.methods import define
from fastkd.models import WeightsError, create_model, load_weights
from fastkd.training import distributed, resume, run_dir
from fastkd.training.config import Config
from fastkd.training.evaluation import evaluate, placed
from fastkd.training.phases import train
from fastkd.training.teacher_images import identity_of


def find_teacher(config: Config) -> tuple[nn.Module, float]:
    """The trained teacher and its test accuracy: from --teacher-checkpoint, an earlier run, or trained.

    Several teachers are a ModuleList, with the mean of their accuracies. Raises TeacherError if there is no
    teacher, which no run of the command can do without.
    """
    try:
        return _find_teacher(config)
    except UserError as error:
        if type(error) is not UserError:  # such as another process's
            raise
        raise TeacherError(str(error)) from None


def _find_teacher(config: Config) -> tuple[nn.Module, float]:
    first, accuracy = _first_teacher(config)
    teachers, accuracies = [first], [accuracy]
    for place, (name, path) in enumerate(config.settings.more_teachers, 1):
        teachers.append(create_model(name, config.data.classes))
        accuracies.append(_load(config, teachers[-1], path, name, place))
    return (nn.ModuleList(teachers) if len(teachers) > 1 else first), sum(accuracies) / len(accuracies)


def teacher_file(config: Config) -> Path:
    """Where the weights of the first teacher lie, or will lie once it is trained."""
    return config.settings.teacher_checkpoint or config.teacher_path()


def _first_teacher(config: Config) -> tuple[nn.Module, float]:
    path = teacher_file(config)
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
    return teacher, _load(config, teacher, path, config.models.teacher)


def _load(config: Config, teacher: nn.Module, path: Path, name: str, place: int = 0) -> float:
    """Gives all processes the weights in ``path``, and returns their accuracy; ``place``: which teacher."""
    weights, accuracy = distributed.from_first(lambda: load_teacher(config, teacher, path, name, place))
    teacher.load_state_dict(weights)
    return float(accuracy)


@contextmanager
def teacher_lock(config: Config, path: Path) -> Iterator[None]:
    """Of several commands with the same output folder one trains the teacher; the others wait here for it."""
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


def load_teacher(
    config: Config, teacher: nn.Module, path: Path, name: str, place: int = 0
) -> tuple[dict[str, Any], float]:
    """Loads ``path`` into ``teacher``, says what it is, returns weights and accuracy. Raises UserError."""
    try:
        about = load_weights(teacher, path, say=say).get("config")
    except WeightsError as error:
        raise UserError(str(error)) from None
    found = identity_of(about)
    other = resume.differences(found, config.identity("teacher"))
    if other and config.settings.teacher_checkpoint is None:
        raise UserError(
            f"{path} is another teacher: {resume.in_words(other)}; move it away, or name it by"
            " --teacher-checkpoint"
        )
    batches = config.batches("teacher", config.teacher_normalizations[place])[1]
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
    say(f"teacher: {name} from {path}{how}, {accuracy:.2f} % on {whole}")
    chance = 1 / config.data.classes
    # what guessing reaches, and its spread; of a few images it may reach all
    if accuracy / 100 <= chance + 2 * (chance * (1 - chance) / images) ** 0.5 and accuracy < 100:
        say(
            f"teacher: warning: that is chance for {config.data.classes} classes: there is nothing to learn"
            " from it"
        )
    return {name: value.cpu() for name, value in teacher.state_dict().items()}, accuracy
