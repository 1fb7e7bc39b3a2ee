"""Several students of one seed side by side: one draw of every batch, and one pass of the teacher for all
that can share it.

Each student is a generator (:func:`fastkd.training.phases.training`) that stops before each of its steps and
is sent the batch. It has its own folder, log, random numbers and row, as when it is trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastkd import native
from fastkd.errors import UserError
from fastkd.io.console import fitted, noted_in, say, screens
from fastkd.training.config import Config
from fastkd.training.device import determinism
from fastkd.training.passes import Passes
from fastkd.training.run_summary import describe
from fastkd.training.signals import Interrupted
from fastkd.training.student import Student
from fastkd.training.sweep import labels
from fastkd.training.teacher import find_teacher, teacher_file
from fastkd.training.trainer import Wanted


def groups(configs: Sequence[Config]) -> list[list[int]]:
    """Which of ``configs``, by their places, are trained side by side: those of one seed that see the same
    batches, where a pass of the teacher can be shared. Each of the others is alone.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, config in enumerate(configs):
        recipe, settings = config.recipe, config.settings
        images = recipe.pad_mode, recipe.normalization, config.feed("student").sides
        fields = recipe.batch_size, recipe.drop_last_test, *images
        own = config.compiled or config.captured or settings.more_teachers
        key = (i,) if own else (config.data.name, settings.seed, *fields)
        found.setdefault(key, []).append(i)
    parts = []
    for places in found.values():
        shared = sum(configs[i].method.needs_teacher for i in places) > 1
        parts += [places] if shared else [[i] for i in places]
    return sorted(parts)


def run(configs: Sequence[Config]) -> list[dict[str, Any] | UserError]:
    """Trains the students of ``configs``, one of :func:`groups`; returns their rows in this order.

    An error of one student stands in the place of its row, and does not end the others. Raises UserError,
    Interrupted.
    """
    titles = labels([config.settings for config in configs])
    students = [Student(*each) for each in zip(configs, range(len(configs)), titles, strict=True)]
    with screens(), determinism(configs[0].settings.deterministic):
        try:
            for student in students:
                student.open()
            introduce(students)
            train(students)
        except (KeyboardInterrupt, Interrupted) as stop:
            status = getattr(stop, "status", 130)
            lines = [str(stop)] if isinstance(stop, Interrupted) else []
            lines += [student.stop(KeyboardInterrupt()) for student in students]
            if not any(lines):
                raise
            raise Interrupted("\n".join(filter(None, lines)), status) from None
        except BaseException as error:
            for student in students:
                student.close(error)
            raise
    return [student.row if student.error is None else student.error for student in students]


def introduce(students: Sequence[Student]) -> None:
    """Writes the description of each student into its log, and prints what differs from the first one."""
    say(f"{len(students)} students side by side: {', '.join(student.title for student in students)}")
    known: list[str] = []
    for student in students:
        text = fitted(describe(student.config))
        with noted_in([student.run.folder]):
            say(text, shown="\n".join(line for line in text.splitlines() if line not in known))
        known = known or text.splitlines()
    if not native.CPU.available and students[0].config.device.type == "cpu":
        say(f"no compiled kernels, plain PyTorch instead: {native.CPU.reason}")


def train(students: Sequence[Student]) -> None:
    """Finds their teachers, then trains all of them to the end. Raises UserError, Interrupted."""
    batches, passes = students[0].config.batches("student"), Passes()
    by_teacher: dict[Path, list[Student]] = {}
    for student in students:
        if student.config.method.needs_teacher:
            by_teacher.setdefault(teacher_file(student.config), []).append(student)
    taught: dict[Student, tuple[nn.Module, float]] = {}
    for some in by_teacher.values():
        with noted_in([student.run.folder for student in some]):
            taught |= dict.fromkeys(some, find_teacher(some[0].config))
    for student in students:
        student.begin(taught.get(student, (None, None)), batches)
    said: set[str] = set()
    while waiting := [student for student in students if student.wants is not None]:
        first = min(turn(student.wants) for student in waiting)
        served = [student for student in waiting if turn(student.wants) == first]
        wanted = [(student.wants, student.run.taught_by) for student in served if student.wants is not None]
        batch = passes.batch(wanted)
        titles = dict(zip((want.trainer for want, _ in wanted), (each.title for each in served), strict=True))
        once = "; once for ".join(", ".join(titles[each] for each in group) for group in passes.shared)
        if once and once not in said:
            said.add(once)
            say(f"the teacher answers to each batch once for {once}")
        for student in served:
            student.go_on(batch.pop(0))


def turn(wanted: Wanted | None) -> tuple[bool, int, int]:
    """Whose step comes first: a first phase before the main one, which alone is tested, then by epoch."""
    assert wanted is not None
    return wanted.trainer.test_batches is not None, wanted.epoch, wanted.step
