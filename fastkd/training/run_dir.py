"""The folder of one training: what it is, how far it came, and that nobody else is at it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd.errors import UserError
from fastkd.io.console import LOG, logged, say
from fastkd.io.files import owned, sweep, write
from fastkd.models import WeightsError, read_checkpoint
from fastkd.training import results
from fastkd.training.config import Plan
from fastkd.training.run_summary import COMMAND, command, command_file
from fastkd.training.settings import AUTO, environment
from fastkd.training.tensorboard import Curves

CHECKPOINT = "last.pt"


@dataclass
class Run:
    """``folder``, its config.json, and the state in its checkpoint: None before the first epoch's end."""

    folder: Path
    config: dict[str, Any]
    state: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.curves = Curves(self.folder)


@contextmanager
def opened(plan: Plan, role: str, folder: Path | None) -> Iterator[Run]:
    """The run in ``folder``, an unfinished one, or a new one, locked until the end. Raises UserError.

    A new one that ends in a UserError before its first checkpoint leaves no folder: nothing of it could be taken up.
    """
    run = new_run(plan, role) if folder is None else load_run(folder, plan.identity(role))
    early = {"config.json", COMMAND, LOG, ".lock", ".lock.held"}
    with owned(run.folder / ".lock") as mine:
        if not mine:
            raise UserError(f"{run.folder} is in the hands of another process")
        sweep(run.folder)
        try:
            with logged(run.folder), closing(run.curves):
                yield run
        except UserError:
            if folder is None and {path.name for path in run.folder.iterdir()} <= early:
                with suppress(OSError):
                    for path in run.folder.iterdir():
                        path.unlink()
                    run.folder.rmdir()
            raise


def new_run(plan: Plan, role: str) -> Run:
    identity, started = plan.identity(role), time.strftime("%Y-%m-%d %H:%M:%S")
    stamp = started.translate({ord("-"): None, ord(":"): None, ord(" "): "-"})
    name = f"{identity['trained']}-{identity['dataset']}-{identity['model']}-seed{identity['seed']}-{stamp}"
    folder = new_folder(plan.settings.output, name)
    about = {"trained": identity["trained"], "model": identity["model"], "command": command(plan)}
    if role == "student" and plan.method.needs_teacher and plan.settings.teacher_checkpoint is None:
        about["teacher_file"] = plan.teacher_path().name
    config = {**plan.config(), **about, "identity": identity}
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write(folder / COMMAND, os.fsencode(command_file(plan, role)))  # the bytes of a path that is no UTF-8
    return Run(folder, config)


def load_run(folder: Path, identity: dict[str, Any]) -> Run:
    """An unfinished run. Raises UserError for a damaged or foreign checkpoint, which stays as it is."""
    path, config = folder / CHECKPOINT, read_config(folder)
    if config is None:
        raise UserError(f"{folder} holds no run of this version: no config.json with its identity")
    other = other_than(folder, config, identity)
    if other:
        raise UserError(f"{folder} is a run of another configuration: {listed(other)}")
    if not path.exists():
        return Run(folder, config)
    try:
        state = read_checkpoint(path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    if not isinstance(state.get("config"), dict) or state["config"].get("identity") != config["identity"]:
        raise UserError(f"{path}: not the checkpoint of this run")
    if config["torch"] != str(torch.__version__):
        say(f"resume: begun with torch {config['torch']}, continued with {torch.__version__}: the last bits may differ")
    if config.get("environment", environment()) != environment():
        words = [" ".join(one) or "none of its variables" for one in (config["environment"], environment())]
        say(f"resume: begun with {words[0]}, continued with {words[1]}: the last bits may differ")
    return Run(folder, config, state)


Differences = dict[str, tuple[Any, Any]]
TEACHER = {"teacher_seed", "teacher_weights", "teacher_checkpoint"}
"""What an identity says of a teacher beside its architecture."""


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Differences:
    """(found, wanted) under each key whose values differ."""
    pairs = {key: (found.get(key), wanted.get(key)) for key in [*wanted, *found]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def listed(other: Differences) -> str:
    return ", ".join(f"{key} {found} instead of {wanted}" for key, (found, wanted) in other.items())


def other_than(folder: Path, config: dict[str, Any], identity: dict[str, Any]) -> Differences:
    """How the run in ``folder`` differs from ``identity``. A teacher that was moved is the same one by its weights."""
    other = differences(config["identity"], identity)
    if identity.get("teacher_weights") and other.keys() <= TEACHER and other:
        with suppress(WeightsError):
            if read_checkpoint(folder / CHECKPOINT).get("taught_by") == identity["teacher_weights"]:
                return {}
    return other


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config of a run that can be taken up, or None: something else, or of a version that knew no identities."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("identity"), dict) else None


def folders(output: Path, identity: dict[str, Any]) -> tuple[list[Path], list[Path]]:
    """Runs of that identity under ``output``: (unfinished, finished), those without and with a row in its table. Raises UserError."""
    done = {row.get("folder") for row in results.read_rows(output)[1]}
    found = [path for path, config in configs(output) if not other_than(path, config, identity)]
    return [path for path in found if path.name not in done], [path for path in found if path.name in done]


def configs(output: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, config) of every run under ``output``."""
    paths = [path.parent for path in sorted(output.glob("*/config.json"))]
    return [(path, config) for path in paths if (config := read_config(path)) is not None]


def finished(plan: Plan) -> dict[str, str] | None:
    """The row of the latest finished run of this configuration, if there is one. Raises UserError."""
    done = [path.name for path in folders(plan.settings.output, plan.identity("student"))[1]]
    rows = [row for row in results.read_rows(plan.settings.output)[1] if row.get("folder") in done]
    return rows[-1] if rows else None


def nothing(plan: Plan) -> UserError:
    """That no run of this configuration is unfinished: is it finished, or which one is nearest to it."""
    output, identity = plan.settings.output, plan.identity("student")
    row, rest = finished(plan), "without --resume it begins"
    if row is not None:
        rest = f"{row['folder']} is finished"
    else:
        done = {row.get("folder") for row in results.read_rows(output)[1]}
        left = [(path, config) for path, config in configs(output) if path.name not in done and config.get("trained") != "teacher"]
        found = [(other_than(path, config, identity), path.name) for path, config in left]
        if found:
            other, name = min(found, key=lambda pair: len(pair[0]))
            rest = f"the nearest is {name}: {listed(other)}; {rest}"
    return UserError(f"--resume: no unfinished run of this configuration under {output}; {rest}")


def find(plan: Plan) -> Path | None:
    """The folder that ``--resume`` means; None where only the teacher's training had begun. Raises UserError: none, several.

    ``auto`` takes the one that came furthest, since all of one identity end alike, and None where there is none.
    """
    output, wanted = plan.settings.output, plan.settings.resume
    if wanted and wanted != AUTO:
        folder = next((path for path in (Path(wanted), output / wanted) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"--resume {wanted}: no such folder, neither here nor under {output}")
        if folder.name in {row.get("folder") for row in results.read_rows(output)[1]}:
            raise UserError(f"--resume {wanted}: that run is finished; its row is in {output / 'results.csv'}")
        return folder
    found, _ = folders(output, plan.identity("student"))
    if wanted == AUTO:
        return max(found, key=epochs_of, default=None)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"--resume: {len(found)} unfinished runs of this configuration under {output}: {names}; name one: --resume FOLDER")
    if not found and not teachers(plan):
        raise nothing(plan)
    return found[0] if found else None


def teachers(plan: Plan) -> list[Path]:
    """Unfinished trainings of the teacher that this plan waits for; where the teacher is there, those that lack only their row."""
    if not plan.method.needs_teacher or plan.settings.teacher_checkpoint is not None:
        return []
    found, there = folders(plan.settings.output, plan.identity("teacher"))[0], plan.teacher_path().exists()
    return [folder for folder in found if not there or epochs_of(folder) == plan.recipe.epochs]


def epochs_of(folder: Path) -> int:
    """How many epochs its log has."""
    try:
        return len(results.read_table(folder / "epochs.csv", ("epoch",))[1])
    except UserError:
        return 0


def new_folder(output: Path, name: str) -> Path:
    """A folder of its own for a run, also when another one began in the same second. Raises UserError."""
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        try:
            (output / (name + suffix)).mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"the folder {output / name} cannot be made: {error.strerror or error}") from None
        return output / (name + suffix)
    raise UserError(f"{output / name} and 98 more are there already")
