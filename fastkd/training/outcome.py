"""The end of a run: its row of the table, its last lines, or where it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fastkd
from fastkd.errors import UserError
from fastkd.models import WeightsError, read_checkpoint
from fastkd.training import results
from fastkd.training.command import command
from fastkd.training.config import Config
from fastkd.training.device import device_name
from fastkd.training.groups import written
from fastkd.training.progress import clock
from fastkd.training.resume import CHECKPOINT
from fastkd.training.run_dir import RunDir
from fastkd.training.settings import environment
from fastkd.training.trainer import Trainer


def row_of(
    config: Config, role: str, run: RunDir, trainer: Trainer, teacher_acc: float | None
) -> dict[str, Any]:
    """The run as a row of the table, without its number."""
    settings, best, last = config.settings, trainer.best(), trainer.history[-1]
    taught, files = teacher_acc is not None, [file for _, file in config.all_teachers if file]
    overridden = [f"{key}={written(value)}" for key, value in settings.overrides.items()]
    words = config.options() if role == "student" else []
    settled = [word for word in words if word.partition("=")[0] in config.settled]
    changed = [word for word in words if word not in settled]
    if taught and settings.more_teachers:
        changed.append(f"join_teachers={config.join_teachers}")
    return {
        "method": run.config["trained"],
        "dataset": config.data.title,
        "student": run.config["model"],
        "teacher": config.teachers() if taught else "",
        "start_time": run.started,
        "acc": f"{best['test_acc']:.2f}",
        "epoch": best["epoch"],
        "nepoch": config.recipe.epochs,
        "lr": config.recipe.lr,
        "batch_size": config.recipe.batch_size,
        "last_acc": f"{last['test_acc']:.2f}",
        "seed": config.seed_of(role),
        "recipe": config.recipe_name,
        "precision": settings.precision,
        "device": device_name(config.device),
        "seconds": round(run.seconds, 1),
        "images_per_second": round(trainer.pace()),
        "fastkd": fastkd.__version__,
        "processes": config.processes,
        "reported_acc": f"{trainer.weights()[1]['test_acc']:.2f}",
        "teacher_acc": "" if teacher_acc is None else f"{teacher_acc:.2f}",
        "train_acc": f"{last['train_acc']:.2f}",
        "losses": " ".join(f"{term}={last[term]:.4g}" for term in trainer.distillation.names),
        "overrides": " ".join([*overridden, *changed, *config.own_words(role)]),
        "teacher_seed": config.seed_of("teacher") if taught and settings.teacher_checkpoint is None else "",
        "deterministic": "yes" if settings.deterministic else "no",
        "compiled": "yes" if config.compiled else "no",
        "cuda_graph": "yes" if config.captured else "no",
        "environment": " ".join(environment()),
        "teacher_checkpoint": " + ".join(map(str, files)) if taught else "",
        "student_checkpoint": settings.student_checkpoint or "" if role == "student" else "",
        "settled": " ".join(settled),
        "plugins": ", ".join(f"{key} of {where}" for key, where in config.added(role).items()),
        "folder": run.folder.name,
    }


def ending(config: Config, role: str, row: Mapping[str, Any], folder: Path) -> str:
    """The row, the files, and for a student the command that repeats it."""
    title = row["method"]
    figures = f"best {row['acc']} % (epoch {row['epoch']}), last {row['last_acc']} %, {clock(row['seconds'])}"
    lines = [
        f"{title}: {figures}; {config.recipe_name} reports the {config.recipe.report}:"
        f" {row['reported_acc']} %",
        f"{title}: row {row['no']} of {config.settings.output / 'results.csv'}, weights in {folder}",
    ]
    if role == "teacher":
        return "\n".join(lines)
    names = results.COLUMNS[:11]
    widths = [max(len(name), len(str(row[name]))) for name in names]
    lines += [
        "  ".join(str(word).ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in (names, [row[name] for name in names])
    ]
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    lines += [f"files    {', '.join(files)}", f"again    {command(config)}"]
    return "\n".join(lines)


def how_far(label: str, phase: str, trainer: Trainer, folder: Path, output: Path) -> str:
    """One line for whoever stopped the run, from what its files hold after the signal."""
    trained, epochs, saved, best, added = len(trainer.history), trainer.recipe.epochs, 0, "", False
    with suppress(WeightsError):
        state = read_checkpoint(folder / CHECKPOINT)
        saved = state["epoch"] if state["phase"] == phase else 0
        if phase == "main":
            best = f" and the best ({read_checkpoint(folder / 'best.pt')['acc']:.2f} %)"
    with suppress(UserError):
        added = any(row.get("folder") == folder.name for row in results.read_rows(output)[1])
    if saved < trained:
        where = f"in epoch {trained} of {epochs}, while it was saved"
    elif trained < epochs:
        where = f"in epoch {trained + 1} of {epochs}, step {trainer.step} of {len(trainer.batches)}"
    else:
        where = "after its last epoch"
    kept = f"the weights of epoch {saved}{best} are in {folder}" if saved else "no epoch was saved"
    rest = "its row was added" if added else "no row was added; --resume goes on"
    return f"{label} stopped {where}; {kept}; {rest}"
