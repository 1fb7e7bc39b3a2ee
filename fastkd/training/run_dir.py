"""The folder of one training: its configuration, its progress, and a lock against other processes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastkd.errors import UserError, one_line
from fastkd.io.console import LOG, logged, say
from fastkd.io.files import make_folder, owned, save, sweep, write
from fastkd.models import WeightsError, read_checkpoint
from fastkd.models.specs import file_name
from fastkd.training import distributed, results
from fastkd.training.command import COMMAND, command, command_file
from fastkd.training.config import Config
from fastkd.training.resume import CHECKPOINT, differences_of, in_words, read_config
from fastkd.training.settings import environment
from fastkd.training.teacher_images import identity_of
from fastkd.training.tensorboard import Curves

if TYPE_CHECKING:
    from fastkd.training.trainer import Trainer


class RunDir:
    """The folder of one training: its config.json, the state in its checkpoint (None before the first epoch's
    end), its files.

    Of several processes the first writes; in the others, whose ``writes`` is False, every method that writes
    does nothing.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], state: dict[str, Any] | None = None, writes: bool = True
    ):
        self.folder, self.config, self.state, self.writes = folder, config, state, writes
        self.curves = Curves(folder)

    def begin(self, phases: Sequence[str], taught_by: str | None) -> None:
        """Finds out which of ``phases`` the checkpoint has finished. ``taught_by``: the fingerprint of the
        teacher's weights. Raises UserError for a checkpoint of another kind of run or another teacher.
        """
        state = self.state or {}
        if state and (state.get("phase") not in phases or state.get("taught_by") != taught_by):
            why = (
                "the run had another teacher"
                if state.get("phase") in phases
                else "the checkpoint of another kind of run"
            )
            raise UserError(f"{self.folder / CHECKPOINT}: {why}")
        self.taught_by, self.begun = taught_by, time.perf_counter()
        self.started = state.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.before = state.get("elapsed", 0.0)
        self.finished_phases = phases.index(state["phase"]) if state else 0
        self.curves.earlier = phases[: self.finished_phases]

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return float(self.before + time.perf_counter() - self.begun)

    def restore(self, trainer: Trainer) -> None:
        """Loads the checkpoint's state into ``trainer``, and writes the files that follow from it again: the
        run may have been killed before it wrote them.
        """
        assert self.state is not None
        try:
            trainer.load(self.state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            text = one_line(error)[:200]
            raise UserError(
                f"{self.folder / CHECKPOINT}: damaged, or of another version ({type(error).__name__}: {text})"
            ) from None
        self.write_epoch_files(self.state["phase"], trainer, rewrite=True)

    def save_epoch(self, phase: str, trainer: Trainer) -> None:
        """Writes the checkpoint after an epoch, then the files that follow from it."""
        if self.writes:
            about = {"config": self.config, "started": self.started, "taught_by": self.taught_by}
            save(
                self.folder / CHECKPOINT,
                {**about, **trainer.state(), "phase": phase, "elapsed": self.seconds},
            )
            self.write_epoch_files(phase, trainer)

    def write_epoch_files(self, phase: str, trainer: Trainer, rewrite: bool = False) -> None:
        """Writes curves, the table of epochs and, if they are new or ``rewrite`` is set, the best weights."""
        history = trainer.history
        if not history or not self.writes:
            return
        self.curves.add(phase, history)
        write(
            self.folder / ("epochs.csv" if phase == "main" else f"{phase}.csv"),
            results.table(list(history[-1]), history),
        )
        if phase == "main" and (rewrite or trainer.best() is history[-1]):
            self.write_weights(self.folder / "best.pt", trainer.best_weights, trainer.best())

    def write_weights(self, path: Path, weights: dict[str, Any], epoch: dict[str, float]) -> None:
        """Saves the weights of ``epoch`` alone, for other uses, such as another run's teacher."""
        if self.writes:
            if path.parent != self.folder:
                make_folder(path.parent)
            save(
                path,
                {"model": weights, "epoch": epoch["epoch"], "acc": epoch["test_acc"], "config": self.config},
            )


@contextmanager
def opened(config: Config, role: str, folder: Path | None) -> Iterator[RunDir]:
    """The run in ``folder``, unfinished or new. The first process locks it to the end. Raises UserError."""
    with ExitStack() as stack:
        whole = distributed.from_first(lambda: stack.enter_context(_locked(config, role, folder)))
        if not distributed.leads():
            whole = RunDir(whole.folder, whole.config, whole.state, writes=False)
        yield whole


@contextmanager
def _locked(config: Config, role: str, folder: Path | None) -> Iterator[RunDir]:
    """Opens and locks the run. A new one that ends in a UserError before its first epoch leaves no folder."""
    run = new_run(config, role) if folder is None else load_run(folder, config.identity(role))
    early = {"config.json", COMMAND, LOG, ".lock", ".lock.held"}
    with owned(run.folder / ".lock") as mine:
        if not mine:
            raise UserError(f"{run.folder} is in use by another process")
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
    parts = identity["trained"], identity["dataset"], file_name(identity["model"]), f"seed{identity['seed']}"
    make_folder(config.settings.output)  # no earlier: a command that cannot run leaves none
    folder = new_folder(config.settings.output, "-".join([*parts, stamp]))
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
    other = differences_of(folder, config, identity)
    if other:
        raise UserError(f"{folder} is a run of another configuration: {in_words(other)}")
    if not path.exists():
        return RunDir(folder, config)
    try:
        state = read_checkpoint(path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    if identity_of(state.get("config")) != config["identity"]:
        raise UserError(f"{path}: not the checkpoint of this run")
    if config["torch"] != str(torch.__version__):
        both = f"begun with torch {config['torch']}, continued with {torch.__version__}"
        say(f"resume: {both}: the last bits may differ")
    if config.get("environment", environment()) != environment():
        words = [" ".join(one) or "none of its variables" for one in (config["environment"], environment())]
        say(f"resume: begun with {words[0]}, continued with {words[1]}: the last bits may differ")
    return RunDir(folder, config, state)


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
