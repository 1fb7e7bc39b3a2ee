"""One configuration with several seeds: its rows, their mean and their spread."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastkd.errors import UserError
from fastkd.io.console import say, screens
from fastkd.training import distributed, results, resume
from fastkd.training.config import Config
from fastkd.training.experiment import run
from fastkd.training.flags import refuse_idle
from fastkd.training.groups import mean_and_spread
from fastkd.training.settings import AUTO, Settings


def repeat(settings: Settings, times: int) -> list[dict[str, Any]]:
    """``run`` with seed, seed + 1, ... and one teacher, as the published tables have it: that of the first
    seed. Returns the rows.

    With ``resume`` finished seeds are not run again. Raises UserError, Interrupted.
    """
    with screens(), distributed.group(settings.device):
        return _repeat(settings, times)


def _repeat(settings: Settings, times: int) -> list[dict[str, Any]]:
    if times < 1:
        raise UserError(f"--repeats is {times}, wanted at least 1")
    refuse_idle(settings)
    if times == 1 or settings.dry_run:
        return [run(settings)]
    if settings.resume and settings.resume != AUTO:
        raise UserError("--resume FOLDER is one run; with --repeats leave the folder out")
    teacher_seed = settings.seed if settings.teacher_seed is None else settings.teacher_seed
    each = [
        dataclasses.replace(settings, seed=settings.seed + i, teacher_seed=teacher_seed) for i in range(times)
    ]
    done: dict[int, dict[str, Any]] = {}
    if settings.resume is not None:
        each, done = distributed.from_first(lambda: resumed(each))
    for i, one in enumerate(each, 1):
        if one.seed in done:
            row = done[one.seed]
            say(f"seed {one.seed}, run {i} of {times}: finished, row {row['no']}, {row['reported_acc']} %\n")
        else:
            say(f"seed {one.seed}, run {i} of {times}")
            done[one.seed] = run(one)
            say("")
    rows = [done[one.seed] for one in each]
    figures = (
        f"{name} {mean_and_spread([float(row[name]) for row in rows])} %" for name in ("acc", "reported_acc")
    )
    seeds = " ".join(str(one.seed) for one in each)
    say(
        f"{times} runs, seeds {seeds}: {', '.join(figures)} (mean ± sample standard deviation); kept in"
        f" {settings.output / 'results.md'}"
    )
    return rows


def resumed(each: list[Settings]) -> tuple[list[Settings], dict[int, dict[str, Any]]]:
    """(settings, rows of finished seeds): each seed goes on, begins or is finished. Raises UserError where
    nothing had begun at all.
    """
    rows = {row.get("folder"): row for row in results.read_rows(each[0].output)[1]}
    done: dict[int, dict[str, Any]] = {}
    settings, begun = [], False
    for one in each:
        config = Config(one)
        unfinished, finished = resume.runs_of(one.output, config.identity("student"))
        waits = bool(unfinished or resume.unfinished_teachers(config))
        if finished and not unfinished:
            done[one.seed] = dict(rows[finished[-1].name])
        settings.append(dataclasses.replace(one, resume=one.resume if waits else None))
        begun = begun or waits or bool(finished)
    if not begun and each[0].resume != AUTO:
        raise resume.nothing_to_resume(Config(each[0]))
    return settings, done
