"""One run from settings to a row of the table: teacher, student, records."""

from __future__ import annotations

import ctypes
import hashlib
import time
from pathlib import Path
from typing import Any

from torch import nn

import fastkd
from fastkd import native
from fastkd.methods import Method, create_method
from fastkd.models import WeightsError, create_model, load_weights
from fastkd.training import distributed, pictures, records, runs
from fastkd.training.console import say
from fastkd.training.determinism import determinism
from fastkd.training.devices import device_name
from fastkd.training.errors import Interrupted, UserError
from fastkd.training.files import make_folder, save, write
from fastkd.training.loop import Loop, evaluate, placed
from fastkd.training.phases import lead, lead_epoch, phase_loop
from fastkd.training.plan import Plan
from fastkd.training.progress import Progress, clock
from fastkd.training.runs import CHECKPOINT, Run
from fastkd.training.screens import ending
from fastkd.training.settings import Settings


def run(settings: Settings) -> dict[str, Any]:
    """Trains or loads the teacher if the method needs one, trains the student, adds its row to the table and returns it.

    Raises UserError for whatever the user can mend, Interrupted after Ctrl-C.
    """
    plan = Plan(settings)
    distributed.order(settings)  # the others find the data that the plan may have fetched
    found = runs.find(plan) if settings.resume is not None else None
    # the student's folder is there before the teacher's training begins, so that --resume finds the run whenever it was killed
    with determinism(settings.deterministic), runs.opened(plan, "student", found) as student:
        say(plan.describe())
        if plan.device.type == "cpu" and not native.CPU.available:
            say(f"no compiled kernels, plain PyTorch instead: {native.CPU.reason}")
        teacher, accuracy = find_teacher(plan) if plan.method.needs_teacher else (None, None)
        return train(plan, "student", student, plan.method, teacher, accuracy)


def find_teacher(plan: Plan) -> tuple[nn.Module, float]:
    """The trained teacher and its test accuracy: from --teacher-checkpoint, from an earlier run, or trained now."""
    settings, name = plan.settings, plan.models.teacher
    path = settings.teacher_checkpoint or plan.teacher_path()
    begun = runs.teachers(plan) if settings.resume is not None else []
    if begun or (settings.teacher_checkpoint is None and not path.exists()):
        folder = max(begun, key=runs.epochs_of, default=None)  # all of one identity end alike, so the one that came furthest serves
        what = f"{path} is not there yet; training it first" if folder is None else f"going on with its training in {folder}"
        say(f"teacher: {what}")
        with runs.opened(plan, "teacher", folder) as opened:
            train(plan, "teacher", opened, create_method("baseline"), None, None)
    teacher = create_model(name, plan.data.classes)
    try:
        load_weights(teacher, path)
    except WeightsError as error:
        raise UserError(str(error)) from None
    batches = plan.batches("teacher")[1]
    accuracy = evaluate(placed(teacher, plan.device), batches, plan.autocast())
    images = len(batches) * batches.batch_size if batches.drop_last else batches.count
    whole = "the test set" if images == batches.count else f"{images:,} images of the test set"
    say(f"teacher: {name} from {path}, {accuracy:.2f} % on {whole}")
    return teacher, accuracy


def train(plan: Plan, role: str, run: Run, method: Method, teacher: nn.Module | None, teacher_acc: float | None) -> dict[str, Any]:
    """Trains the plan's student or teacher (``role``) in the folder of ``run``, from its state if it has one, and records it.

    The checkpoint, the best weights and the log are on disk after every epoch. Raises UserError, Interrupted.
    """
    title, state, phases = run.config["trained"], run.state or {}, plan.phases(method)
    common = {
        "config": run.config,
        "started": state.get("started", time.strftime("%Y-%m-%d %H:%M:%S")),
        "taught_by": None if teacher is None else fingerprint(teacher),
    }
    before, begun = state.get("elapsed", 0.0), time.perf_counter()
    student, batches = plan.new_model(role), plan.batches(role)
    names = [name for name, _, _ in phases]
    if state and (state.get("phase") not in names or state.get("taught_by") != common["taught_by"]):
        why = "its teacher was another" if state.get("phase") in names else "not the checkpoint of such a run"
        raise UserError(f"{run.folder / CHECKPOINT}: {why}")
    for phase in phases[names.index(state["phase"]) if state else 0 :]:
        name, recipe, main = phase[0], phase[1], phase[0] == "main"
        loop = phase_loop(plan, role, phase, student, teacher, batches)
        label = title if main else f"{title} {name}"
        if state.get("phase") == name:
            take_up(loop, state, run.folder)
            say(f"{label}: {run.folder} goes on after epoch {len(loop.history)} of {recipe.epochs}")
            keep_best(loop, run, name, anew=True)
        elif run.state is None and name == names[0]:
            say(f"{label}: begins in {run.folder}")
        lead(loop, role, name)
        progress = Progress(label, loop.steps, len(loop.history) * len(loop.batches))
        try:
            for epoch in range(len(loop.history) + 1, recipe.epochs + 1):
                lead_epoch(loop, epoch, progress)
                elapsed = before + time.perf_counter() - begun
                save(run.folder / CHECKPOINT, {**common, **loop.state(), "phase": name, "elapsed": elapsed})
                keep_best(loop, run, name)
                progress.line(f"{label} epoch {epoch}/{recipe.epochs}  {loop.summary()}  {clock(progress.left())} left")
            if not main:
                continue
            if role == "teacher":
                keep_teacher(plan, loop, run)
            row = row_of(plan, role, run, loop, teacher_acc, common["started"], before + time.perf_counter() - begun)
            row = records.append(plan.settings.output, row)
        except KeyboardInterrupt:
            raise Interrupted(how_far(label, loop, run.folder)) from None
        finally:
            progress.close()
    if role == "student" and plan.settings.pictures:  # after the row: nothing that fails here can lose it
        student.load_state_dict(loop.weights()[0])
        pictures.keep(plan, run.folder, student, teacher)
    say(ending(plan, role, row, records.COLUMNS[:11], run.folder))
    return row


def take_up(loop: Loop, state: dict[str, Any], folder: Path) -> None:
    try:
        loop.load(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / CHECKPOINT}: damaged, or of another version ({type(error).__name__}: {text})") from None


def keep_best(loop: Loop, run: Run, phase: str, anew: bool = False) -> None:
    """The files that follow from a checkpoint: curves, the log, and the best weights when they are new; ``anew``: whatever is there.

    A process killed before this has kept the checkpoint already; whoever takes that up calls it again.
    """
    if not loop.history:
        return
    run.curves.add(phase, loop.history)
    table = records.table(list(loop.history[-1]), loop.history)
    write(run.folder / ("epochs.csv" if phase == "main" else f"{phase}.csv"), table)
    if phase == "main":
        best = loop.best()
        if anew or best is loop.history[-1]:
            save(run.folder / "best.pt", weights_file(loop.best_weights, best, run))


def keep_teacher(plan: Plan, loop: Loop, run: Run) -> None:
    make_folder(plan.settings.output / "teachers")
    save(plan.teacher_path(), weights_file(*loop.weights(), run))


def weights_file(weights: dict[str, Any], epoch: dict[str, float], run: Run) -> dict[str, Any]:
    return {"model": weights, "epoch": epoch["epoch"], "acc": epoch["test_acc"], "config": run.config}


def row_of(plan: Plan, role: str, run: Run, loop: Loop, teacher_acc: float | None, started: str, seconds: float) -> dict[str, Any]:
    """The run as a row of the table, without its number."""
    settings, best, last = plan.settings, loop.best(), loop.history[-1]
    taught, file = teacher_acc is not None, settings.teacher_checkpoint
    fields = [(key, " ".join(map(str, value)) if isinstance(value, tuple) else value) for key, value in settings.overrides.items()]
    return {
        "method": run.config["trained"],
        "dataset": plan.data.name,
        "student": run.config["model"],
        "teacher": plan.models.teacher if taught else "",
        "start_time": started,
        "acc": f"{best['test_acc']:.2f}",
        "epoch": best["epoch"],
        "nepoch": plan.recipe.epochs,
        "lr": plan.recipe.lr,
        "batch_size": plan.recipe.batch_size,
        "last_acc": f"{last['test_acc']:.2f}",
        "seed": plan.seed_of(role),
        "recipe": plan.recipe_name,
        "precision": settings.precision,
        "device": device_name(plan.device),
        "seconds": round(seconds, 1),
        "images_per_second": round(loop.pace()),
        "fastkd": fastkd.__version__,
        "reported_acc": f"{loop.weights()[1]['test_acc']:.2f}",
        "teacher_acc": "" if teacher_acc is None else f"{teacher_acc:.2f}",
        "train_acc": f"{last['train_acc']:.2f}",
        "losses": " ".join(f"{term}={last[term]:.4g}" for term in loop.method.names),
        "overrides": " ".join(f"{key}={value}" for key, value in fields),
        "teacher_seed": plan.seed_of("teacher") if taught and file is None else "",
        "teacher_checkpoint": file if taught and file is not None else "",
        "folder": run.folder.name,
    }


def fingerprint(model: nn.Module) -> str:
    """The same for the same weights only, so that a run is not taken up under another teacher."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(name.encode() + ctypes.string_at(value.data_ptr(), value.numel() * value.element_size()))  # needs no numpy
    return digest.hexdigest()


def how_far(label: str, loop: Loop, folder: Path) -> str:
    """One line for somebody who pressed Ctrl-C."""
    done, epochs = len(loop.history), loop.recipe.epochs
    where = f"in epoch {done + 1} of {epochs}, step {loop.step} of {len(loop.batches)}" if done < epochs else "after its last epoch"
    best = f" and the best ({loop.best()['test_acc']:.2f} %)" if loop.best_weights else ""
    kept = f"the weights of epoch {done}{best} are in {folder}" if done else "no epoch was finished"
    return f"{label} stopped {where}; {kept}; no row was added; --resume goes on"
