"""The runs of one command: several methods, points of a grid and seeds; their rows, means and spread."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from fastkd.errors import PartlyFailedError, TeacherError, UserError
from fastkd.io.console import counted, say, screens
from fastkd.training import distributed, results, resume, together
from fastkd.training.config import Config
from fastkd.training.device import find_device
from fastkd.training.experiment import run, shared_config
from fastkd.training.flags import without_idle
from fastkd.training.groups import mean_and_spread
from fastkd.training.settings import AUTO, Settings
from fastkd.training.sweep import labels, points


def repeat(settings: Settings, times: int = 1) -> list[dict[str, Any]]:
    """``run`` with seed, seed + 1, ... and one teacher, as the published tables have it: that of the first
    seed. Returns the rows.

    ``settings.method`` may be several with commas between them, and an option may have several values: each
    seed then has a run for every method and every point of the grid, side by side where that saves time
    (:mod:`fastkd.training.together`). With ``resume`` finished runs are not run again. A run that fails does
    not end the others. Raises UserError, Interrupted.
    """
    with screens(), distributed.group(settings.device):
        return _repeat(settings, times)


def _repeat(settings: Settings, times: int) -> list[dict[str, Any]]:
    if times < 1:
        raise UserError(f"--repeats is {times}, wanted at least 1")
    each = without_idle(points(settings))
    if settings.dry_run and settings.resume not in (None, AUTO):
        raise UserError(
            f"--resume {settings.resume}: --dry-run plans a run from its beginning; leave one out"
        )
    if settings.dry_run:
        return [run(one) for one in each]
    if len(each) * times == 1:
        return [run(each[0])]
    if settings.resume and settings.resume != AUTO:
        several = "--repeats" if times > 1 else "several methods or values of an option"
        raise UserError(f"--resume FOLDER is one run; with {several} leave the folder out")
    if len(each) > 1:
        each = checked(each)
    if times > 1:
        teacher_seed = settings.seed if settings.teacher_seed is None else settings.teacher_seed
        each = [
            dataclasses.replace(one, seed=settings.seed + i, teacher_seed=teacher_seed)
            for i in range(times)
            for one in each
        ]
    names, done = labels(each), dict[int, dict[str, Any]]()
    failed: list[str] = []
    if settings.resume is not None:
        each, done = distributed.from_first(lambda: resumed(each))
    for i, (seed, part) in enumerate(itertools.groupby(range(len(each)), lambda i: each[i].seed), 1):
        places = list(part)
        seeds = f"seed {seed}, run {i} of {times}"
        for place in places:
            if place in done:
                row = done[place]
                what = seeds if len(places) == 1 else f"{seeds}, {names[place]}"
                say(f"{what}: finished, row {row['no']}, {row['reported_acc']} %\n")
        left = [place for place in places if place not in done]
        if left:
            if times > 1:
                say(seeds)
            for place, found in zip(left, side_by_side([each[place] for place in left]), strict=True):
                if isinstance(found, UserError):
                    which = [names[place]] * (len(places) > 1) + [f"seed {seed}"] * (times > 1)
                    failed.append(f"{', '.join(which)}: {found}")
                else:
                    done[place] = found
            say("")
    if done:
        there = sorted(done)
        summarize([each[i] for i in there], [names[i] for i in there], [done[i] for i in there])
    if failed:
        if not done:
            raise UserError("; ".join(failed))
        kept = f"the other {len(done)} of {len(each)} runs are finished"
        raise PartlyFailedError(f"{'; '.join(failed)}; {kept}")
    return [done[i] for i in range(len(each))]


def checked(each: Sequence[Settings]) -> list[Settings]:
    """Checks every run before the first is trained, and decides for all whether their steps are compiled: a
    compiled step has the teacher's pass within it, where it cannot be shared. Raises UserError.
    """
    shares = sum(one.method != "baseline" for one in each) > 1 and not each[0].more_teachers
    if shares and each[0].compile is None and find_device(each[0].device).type == "cpu":
        each = [dataclasses.replace(one, compile=False) for one in each]
    configs = configured(each)
    same: dict[str, str] = {}
    for name, config in zip(labels(each), configs, strict=True):
        other = same.setdefault(repr(config.identity("student")), name)
        if other != name:
            raise UserError(f"{name} is the same run as {other}: give each value once")
    taught = [config for config in configs if config.method.needs_teacher]
    if len(taught) > 1 and each[0].more_teachers:
        say("one student after the other: the passes of several teachers are not shared")
    elif len(taught) > 1 and all(config.compiled or config.captured for config in taught):
        what = "compiled" if taught[0].compiled else "a CUDA graph"
        say(
            f"one student after the other: each step is {what} with the teacher's pass in it, which is not"
            " shared; --no-compile --no-cuda-graph trains them side by side"
        )
    return list(each)


def configured(each: Sequence[Settings]) -> list[Config]:
    """The configurations of runs that read the same data set, which is in memory once."""
    first = shared_config(each[0])
    return [first, *(shared_config(one, first.data) for one in each[1:])]


def side_by_side(each: Sequence[Settings]) -> list[dict[str, Any] | UserError]:
    """The rows of runs of one seed, which are trained side by side where a pass of the teacher is shared. In
    place of the row of a failed run stands its error. Raises UserError for what concerns all of them.
    """
    configs = configured(each)
    found: dict[int, dict[str, Any] | UserError] = {}
    for places in together.groups(configs):
        some = [configs[i] for i in places]
        try:
            one = len(some) == 1
            found |= zip(places, [run(each[places[0]], some[0])] if one else together.run(some), strict=True)
        except UserError as error:
            if configs[0].processes > 1 or isinstance(error, TeacherError):
                raise
            found |= dict.fromkeys(places, error)
    return [found[i] for i in range(len(each))]


def summarize(each: Sequence[Settings], names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """The last lines: each point, its figures over the seeds, and where they are kept."""
    all_seeds = list(dict.fromkeys(one.seed for one in each))
    times = len(all_seeds)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, row in zip(names, rows, strict=True):
        found.setdefault(name, []).append(row)
    kept = f"kept in {each[0].output / 'results.md'}"
    seeds = f"seed{'s' * (times > 1)} {' '.join(map(str, all_seeds))}"
    spread = " (mean ± sample standard deviation)" * (times > 1)
    if len(found) == 1:
        say(f"{counted(len(rows), 'run')}, {seeds}: {figures(rows)}{spread}; {kept}")
        return
    width = max(map(len, found))
    for name, some in found.items():
        say(f"{name.ljust(width)}  {figures(some)}")
    say(f"{len(rows)} runs, {seeds}{spread}; {kept}")


def figures(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        f"{name} {mean_and_spread([float(row[name]) for row in rows])} %" for name in ("acc", "reported_acc")
    )


def resumed(each: Sequence[Settings]) -> tuple[list[Settings], dict[int, dict[str, Any]]]:
    """(settings, rows of finished runs by their places): each run goes on, begins or is finished. Raises
    UserError where nothing had begun at all.
    """
    rows = {row.get("folder"): row for row in results.read_rows(each[0].output)[1]}
    done: dict[int, dict[str, Any]] = {}
    settings, begun, data = [], False, None
    for place, one in enumerate(each):
        config = Config(one, data)
        data = config.data
        unfinished, finished = resume.runs_of(one.output, config.identity("student"))
        waits = bool(unfinished or resume.unfinished_teachers(config))
        if finished and not unfinished:
            done[place] = dict(rows[finished[-1].name])
        settings.append(dataclasses.replace(one, resume=one.resume if waits else None))
        begun = begun or waits or bool(finished)
    if not begun and each[0].resume != AUTO:
        raise resume.nothing_to_resume(Config(each[0]))
    return settings, done
