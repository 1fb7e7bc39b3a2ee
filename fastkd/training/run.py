"""One run from settings to a row of the table: teacher, student, records."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from torch import nn

import fastkd
from fastkd.methods import Method, create_method
from fastkd.models import WeightsError, create_model, load_weights
from fastkd.training import records
from fastkd.training.errors import Interrupted, UserError
from fastkd.training.files import make_folder, save, write
from fastkd.training.loop import Loop, evaluate, placed
from fastkd.training.plan import Plan, Settings, device_name
from fastkd.training.progress import Progress, clock


def run(settings: Settings) -> dict[str, Any]:
    """Trains or loads the teacher if the method needs one, trains the student, adds its row to the table and returns it.

    Raises UserError for whatever the user can mend, Interrupted after Ctrl-C.
    """
    plan = Plan(settings)
    print(plan.describe(), flush=True)
    teacher, accuracy = find_teacher(plan) if plan.method.needs_teacher else (None, None)
    return train(plan, "student", settings.method, plan.method, teacher, accuracy)


def find_teacher(plan: Plan) -> tuple[nn.Module, float]:
    """The trained teacher and its test accuracy: from --teacher-checkpoint, from an earlier run, or trained now."""
    settings = plan.settings
    path = settings.teacher_checkpoint or plan.teacher_path()
    if settings.teacher_checkpoint is None and not path.exists():
        print(f"teacher: {path} is not there yet; training it first", flush=True)
        train(plan, "teacher", "teacher", create_method("baseline"), None, None)
    teacher = create_model(settings.teacher, plan.data.classes)
    try:
        load_weights(teacher, path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    accuracy = evaluate(placed(teacher, plan.device), plan.batches("teacher")[1], plan.autocast())
    print(f"teacher: {settings.teacher} from {path}, {accuracy:.2f} % on the test set", flush=True)
    return teacher, accuracy


def train(plan: Plan, role: str, title: str, method: Method, teacher: nn.Module | None, teacher_acc: float | None) -> dict[str, Any]:
    """Trains the plan's student or teacher (``role``) in a folder of its own and records it as ``title``.

    The best and the last weights and the log are on disk after every epoch. Raises UserError, Interrupted.
    """
    settings, epochs = plan.settings, plan.recipe.epochs
    name = settings.teacher if role == "teacher" else settings.student
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    stamp = started.translate({ord("-"): None, ord(":"): None, ord(" "): "-"})
    folder = new_folder(settings.output, f"{title}-{plan.data.name}-{name}-seed{settings.seed}-{stamp}")
    config = {**plan.config(), "trained": title, "model": name, "start_time": started, "command": shlex.join(["python", *sys.argv])}
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    loop = Loop(plan.new_model(role), method, teacher, *plan.batches(role), plan.recipe, plan.autocast())
    progress, begun = Progress(title, loop.steps), time.perf_counter()
    try:
        for epoch in range(1, epochs + 1):
            loop.train_epoch(epoch, progress)
            last = loop.history[-1]
            if loop.best() is last:
                save(folder / "best.pt", {"model": loop.student.state_dict(), "epoch": epoch, "acc": last["test_acc"], "config": config})
            save(folder / "last.pt", {**loop.state(), "config": config})
            write(folder / "epochs.csv", records.table(list(last), loop.history))
            progress.line(f"{title} epoch {epoch}/{epochs}  {loop.summary()}  {clock(progress.left())} left")
        if role == "teacher":
            make_folder(settings.output / "teachers")
            write(plan.teacher_path(), (folder / "best.pt").read_bytes())
        best, last, fields = loop.best(), loop.history[-1], settings.overrides.items()
        row = records.append(
            settings.output,
            {
                "method": title,
                "dataset": plan.data.name,
                "student": name,
                "teacher": settings.teacher if teacher is not None else "",
                "start_time": started,
                "acc": f"{best['test_acc']:.2f}",
                "epoch": best["epoch"],
                "nepoch": epochs,
                "lr": plan.recipe.lr,
                "batch_size": plan.recipe.batch_size,
                "last_acc": f"{last['test_acc']:.2f}",
                "seed": settings.seed,
                "recipe": plan.recipe_name,
                "precision": settings.precision,
                "device": device_name(plan.device),
                "seconds": round(time.perf_counter() - begun, 1),
                "images_per_second": round(loop.pace()),
                "fastkd": fastkd.__version__,
                "teacher_acc": "" if teacher_acc is None else f"{teacher_acc:.2f}",
                "train_acc": f"{last['train_acc']:.2f}",
                "losses": " ".join(f"{term}={last[term]:.4g}" for term in method.names),
                "overrides": " ".join(f"{key}={value}" for key, value in fields),
                "folder": folder.name,
            },
        )
    except KeyboardInterrupt:
        raise Interrupted(how_far(title, loop, folder)) from None
    finally:
        progress.close()
    print(f"{title}: best {row['acc']} % (epoch {row['epoch']}), last {row['last_acc']} %, {clock(row['seconds'])}", flush=True)
    print(f"{title}: row {row['no']} of {settings.output / 'results.csv'}, weights in {folder}", flush=True)
    return row


def new_folder(output: Path, name: str) -> Path:
    """A folder of its own for a run, also when another one began in the same second. Raises UserError."""
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        folder = output / (name + suffix)
        if not folder.exists():
            make_folder(folder)
            return folder
    raise UserError(f"{output / name} and 98 more are there already")


def how_far(title: str, loop: Loop, folder: Path) -> str:
    """One line for somebody who pressed Ctrl-C."""
    done, epochs = len(loop.history), loop.recipe.epochs
    where = f"in epoch {done + 1} of {epochs}, step {loop.step} of {len(loop.batches)}" if done < epochs else "after its last epoch"
    kept = (
        f"the weights of epoch {done} and the best ({loop.best()['test_acc']:.2f} %) are in {folder}" if done else "no epoch was finished"
    )
    return f"{title} stopped {where}; {kept}; no row was added"
