"""The folder of one training: what it is, how far it came, and that nobody else is at it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.errors import UserError
from fastkd.io.console import LOG, logged, say
from fastkd.io.files import make_folder, owned, save, sweep, write
from fastkd.models import WeightsError, read_checkpoint
from fastkd.training import distributed, results
from fastkd.training.command import COMMAND, command, command_file
from fastkd.training.config import Config
from fastkd.training.settings import AUTO, environment
from fastkd.training.tensorboard import Curves

if TYPE_CHECKING:
    from fastkd.training.trainer import Trainer

CHECKPOINT = "last.pt"


class RunDir:
    """The folder of one training: its config.json, the state in its checkpoint (None before the first epoch's end), its files.

    Of several processes the first writes; in the others, whose ``writes`` is False, every method that writes does nothing.
    """

    def __init__(self, folder: Path, config: dict[str, Any], state: dict[str, Any] | None = None, writes: bool = True):
        self.folder, self.config, self.state, self.writes = folder, config, state, writes
        self.curves = Curves(folder)

    def begin(self, phases: Sequence[str], taught_by: str | None) -> None:
        """Goes on after the phases that the checkpoint leaves behind. Raises UserError if it is of another kind of run or teacher."""
        state = self.state or {}
        if state and (state.get("phase") not in phases or state.get("taught_by") != taught_by):
            why = "its teacher was another" if state.get("phase") in phases else "not the checkpoint of such a run"
            raise UserError(f"{self.folder / CHECKPOINT}: {why}")
        self.taught_by, self.begun = taught_by, time.perf_counter()
        self.started, self.before = state.get("started", time.strftime("%Y-%m-%d %H:%M:%S")), state.get("elapsed", 0.0)
        self.finished_phases = phases.index(state["phase"]) if state else 0
        self.curves.earlier = phases[: self.finished_phases]

    @property
    def seconds(self) -> float:
        """Of training, those of earlier processes included."""
        return float(self.before + time.perf_counter() - self.begun)

    def take_up(self, trainer: Trainer) -> None:
        """Gives ``trainer`` the state, and writes what follows from it: the process before may have been killed too early."""
        assert self.state is not None
        try:
            trainer.load(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{self.folder / CHECKPOINT}: damaged, or of another version ({type(error).__name__}: {text})") from None
        self.write_epoch_files(self.state["phase"], trainer, anew=True)

    def save_epoch(self, phase: str, trainer: Trainer) -> None:
        """The checkpoint after an epoch, then what follows from it."""
        if self.writes:
            about = {"config": self.config, "started": self.started, "taught_by": self.taught_by}
            save(self.folder / CHECKPOINT, {**about, **trainer.state(), "phase": phase, "elapsed": self.seconds})
            self.write_epoch_files(phase, trainer)

    def write_epoch_files(self, phase: str, trainer: Trainer, anew: bool = False) -> None:
        """Curves, the table of epochs, and the best weights when they are new; ``anew``: whatever is there."""
        history = trainer.history
        if not history or not self.writes:
            return
        self.curves.add(phase, history)
        write(self.folder / ("epochs.csv" if phase == "main" else f"{phase}.csv"), results.table(list(history[-1]), history))
        if phase == "main" and (anew or trainer.best() is history[-1]):
            self.write_weights(self.folder / "best.pt", trainer.best_weights, trainer.best())

    def write_weights(self, path: Path, weights: dict[str, Any], epoch: dict[str, float]) -> None:
        """Weights of ``epoch`` for whoever needs no more, such as another run's teacher."""
        if self.writes:
            if path.parent != self.folder:
                make_folder(path.parent)
            save(path, {"model": weights, "epoch": epoch["epoch"], "acc": epoch["test_acc"], "config": self.config})


@contextmanager
def opened(config: Config, role: str, folder: Path | None) -> Iterator[RunDir]:
    """The run in ``folder``, an unfinished one, or a new one. The first process locks it until the end. Raises UserError."""
    with ExitStack() as stack:
        whole = distributed.from_first(lambda: stack.enter_context(_locked(config, role, folder)))
        if not distributed.leads():
            whole = RunDir(whole.folder, whole.config, whole.state, writes=False)
        yield whole


@contextmanager
def _locked(config: Config, role: str, folder: Path | None) -> Iterator[RunDir]:
    """A new run that ends in a UserError before its first checkpoint leaves no folder: nothing of it could be taken up."""
    run = new_run(config, role) if folder is None else load_run(folder, config.identity(role))
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


def new_run(config: Config, role: str) -> RunDir:
    identity, started = config.identity(role), time.strftime("%Y-%m-%d %H:%M:%S")
    stamp = started.translate({ord("-"): None, ord(":"): None, ord(" "): "-"})
    name = f"{identity['trained']}-{identity['dataset']}-{identity['model']}-seed{identity['seed']}-{stamp}"
    folder = new_folder(config.settings.output, name)
    about = {"trained": identity["trained"], "model": identity["model"], "command": command(config)}
    if role == "student" and config.method.needs_teacher and config.settings.teacher_checkpoint is None:
        about["teacher_file"] = config.teacher_path().name
    values = {**config.config(), **about, "identity": identity}
    write(folder / "config.json", json.dumps(values, indent=2) + "\n")
    write(folder / COMMAND, os.fsencode(command_file(config, role)))  # the bytes of a path that is no UTF-8
    return RunDir(folder, values)


def load_run(folder: Path, identity: dict[str, Any]) -> RunDir:
    """An unfinished run. Raises UserError for a damaged or foreign checkpoint, which stays as it is."""
    path, config = folder / CHECKPOINT, read_config(folder)
    if config is None:
        raise UserError(f"{folder} holds no run of this version: no config.json with its identity")
    other = other_than(folder, config, identity)
    if other:
        raise UserError(f"{folder} is a run of another configuration: {listed(other)}")
    if not path.exists():
        return RunDir(folder, config)
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
    return RunDir(folder, config, state)


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


def choose(config: Config) -> tuple[dict[str, str] | None, Path | None]:
    """(the row of a finished run with which ``--resume auto`` ends, the folder of the run to go on with). Raises UserError."""
    if config.settings.resume is None:
        return None, None
    folder = find(config)
    return (finished(config) if folder is None and config.settings.resume == AUTO else None), folder


def finished(config: Config) -> dict[str, str] | None:
    """The row of the latest finished run of this configuration, if there is one. Raises UserError."""
    done = [path.name for path in folders(config.settings.output, config.identity("student"))[1]]
    rows = [row for row in results.read_rows(config.settings.output)[1] if row.get("folder") in done]
    return rows[-1] if rows else None


def nothing(config: Config) -> UserError:
    """That no run of this configuration is unfinished: is it finished, or which one is nearest to it."""
    output, identity = config.settings.output, config.identity("student")
    row, rest = finished(config), "without --resume it begins"
    if row is not None:
        rest = f"{row['folder']} is finished"
    else:
        done = {row.get("folder") for row in results.read_rows(output)[1]}
        left = [(path, about) for path, about in configs(output) if path.name not in done and about.get("trained") != "teacher"]
        found = [(other_than(path, about, identity), path.name) for path, about in left]
        if found:
            other, name = min(found, key=lambda pair: len(pair[0]))
            rest = f"the nearest is {name}: {listed(other)}; {rest}"
    return UserError(f"--resume: no unfinished run of this configuration under {output}; {rest}")


def find(config: Config) -> Path | None:
    """The folder that ``--resume`` means; None where only the teacher's training had begun. Raises UserError: none, several.

    ``auto`` takes the one that came furthest, since all of one identity end alike, and None where there is none.
    """
    output, wanted = config.settings.output, config.settings.resume
    if wanted and wanted != AUTO:
        folder = next((path for path in (Path(wanted), output / wanted) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"--resume {wanted}: no such folder, neither here nor under {output}")
        if folder.name in {row.get("folder") for row in results.read_rows(output)[1]}:
            raise UserError(f"--resume {wanted}: that run is finished; its row is in {output / 'results.csv'}")
        return folder
    found, _ = folders(output, config.identity("student"))
    if wanted == AUTO:
        return max(found, key=epochs_of, default=None)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"--resume: {len(found)} unfinished runs of this configuration under {output}: {names}; name one: --resume FOLDER")
    if not found and not teachers(config):
        raise nothing(config)
    return found[0] if found else None


def teachers(config: Config) -> list[Path]:
    """Unfinished trainings of the teacher that this plan waits for; where the teacher is there, those that lack only their row."""
    if not config.method.needs_teacher or config.settings.teacher_checkpoint is not None:
        return []
    found, there = folders(config.settings.output, config.identity("teacher"))[0], config.teacher_path().exists()
    return [folder for folder in found if not there or epochs_of(folder) == config.recipe.epochs]


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
