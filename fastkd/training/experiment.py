"""One run from settings to a row of the table, in every one of its processes: teacher, student, records."""

from __future__ import annotations

from typing import Any

from fastkd import native
from fastkd.data.feed import AnyDataset
from fastkd.io.console import fitted, say, screens
from fastkd.training import collectives, distributed, resume, run_dir
from fastkd.training.config import Config
from fastkd.training.device import determinism
from fastkd.training.phases import train
from fastkd.training.run_summary import describe
from fastkd.training.settings import Settings
from fastkd.training.teacher import find_teacher
from fastkd.training.trial import trial


def run(settings: Settings, config: Config | None = None) -> dict[str, Any]:
    """Trains or loads the teacher if the method needs one, trains the student, adds its row to the table and
    returns it. ``config``: what :func:`shared_config` has made of ``settings``.

    Raises UserError for whatever the user can mend, Interrupted after Ctrl-C.
    """
    config = shared_config(settings) if config is None else config
    if settings.dry_run:
        with screens():
            say(fitted(describe(config)))
            say(fitted(trial(config)))
        return {}
    row, folder = distributed.from_first(lambda: resume.choose(config))
    if row is not None:
        done = f"row {row['no']} of {settings.output / 'results.csv'}, {row['reported_acc']} %"
        say(f"{config.settings.method}: {row['folder']} is finished, {done}")
        return dict(row)
    # the student's folder is there before the teacher's training begins, so that --resume finds the run
    # whenever it was killed
    with screens(), determinism(settings.deterministic), run_dir.opened(config, "student", folder) as student:
        say(fitted(describe(config)))
        if config.device.type == "cpu" and not native.CPU.available:
            say(f"no compiled kernels, plain PyTorch instead: {native.CPU.reason}")
        teacher, accuracy = find_teacher(config) if config.method.needs_teacher else (None, None)
        return train(config, "student", student, config.method, teacher, accuracy)


def shared_config(settings: Settings, data: AnyDataset | None = None) -> Config:
    """The first process decides, for instance what ``--precision auto`` is, and fetches the data; the others
    take its settings. ``data``: the set that ``settings`` name, where it is in memory.
    """
    config = Config(settings, data) if distributed.leads() else None
    decided = distributed.from_first(lambda: settings if config is None else config.settings)
    config = config or Config(decided, data)
    collectives.meet()  # nothing is written before all are ready
    return config
