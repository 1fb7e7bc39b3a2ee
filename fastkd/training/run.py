"""One run from settings to a row of the table: teacher, student, records."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import nn

import fastkd
from fastkd import native
from fastkd.methods import Definition, define
from fastkd.models import WeightsError, create_model, fingerprint, load_weights, read_checkpoint
from fastkd.training import distributed, pictures, records, runs
from fastkd.training.console import counted, say, screens
from fastkd.training.determinism import determinism
from fastkd.training.devices import device_name
from fastkd.training.errors import Interrupted, UserError
from fastkd.training.files import locked, make_folder, save, write
from fastkd.training.loop import Loop, evaluate, placed
from fastkd.training.phases import lead, lead_epoch, phase_loop
from fastkd.training.plan import Plan
from fastkd.training.progress import Progress, clock
from fastkd.training.runs import CHECKPOINT, Run
from fastkd.training.screens import ending
from fastkd.training.settings import AUTO, Settings, environment
from fastkd.training.summary import written


def run(settings: Settings) -> dict[str, Any]:
    """Trains or loads the teacher if the method needs one, trains the student, adds its row to the table and returns it.

    Raises UserError for whatever the user can mend, Interrupted after Ctrl-C.
    """
    plan = Plan(settings)
    distributed.order(plan.settings)  # the others find the data that the plan may have fetched
    distributed.synchronize()
    found = runs.find(plan) if settings.resume is not None else None
    if found is None and settings.resume == AUTO and (row := runs.finished(plan)):
        done = f"row {row['no']} of {settings.output / 'results.csv'}, {row['reported_acc']} %"
        say(f"{settings.method}: {row['folder']} is finished, {done}")
        return dict(row)
    # the student's folder is there before the teacher's training begins, so that --resume finds the run whenever it was killed
    with screens(), determinism(settings.deterministic), runs.opened(plan, "student", found) as student:
        say(plan.describe())
        if plan.device.type == "cpu" and not native.CPU.available:
            say(f"no compiled kernels, plain PyTorch instead: {native.CPU.reason}")
        teacher, accuracy = find_teacher(plan) if plan.method.needs_teacher else (None, None)
        return train(plan, "student", student, plan.method, teacher, accuracy)


def find_teacher(plan: Plan) -> tuple[nn.Module, float]:
    """The trained teacher and its test accuracy: from --teacher-checkpoint, from an earlier run, or trained now."""
    settings, name = plan.settings, plan.models.teacher
    path = settings.teacher_checkpoint or plan.teacher_path()
    lock = settings.output / f".{path.name}.lock"
    with locked(lock, Waiting(path)) if settings.teacher_checkpoint is None else nullcontext():
        begun = runs.teachers(plan) if settings.resume is not None else []
        if begun or (settings.teacher_checkpoint is None and not path.exists()):
            folder = max(begun, key=runs.epochs_of, default=None)  # all of one identity end alike, so the one that came furthest serves
            what = f"{path} is not there yet; training it first" if folder is None else f"going on with its training in {folder}"
            say(f"teacher: {what}")
            with runs.opened(plan, "teacher", folder) as opened:
                train(plan, "teacher", opened, define("baseline"), None, None)
    teacher = create_model(name, plan.data.classes)
    try:
        config = load_weights(teacher, path, say=say).get("config")
    except WeightsError as error:
        raise UserError(str(error)) from None
    found = config["identity"] if isinstance(config, dict) and isinstance(config.get("identity"), dict) else {}
    other = runs.differences(found, plan.identity("teacher"))
    if other and settings.teacher_checkpoint is None:
        raise UserError(f"{path} is another teacher: {runs.listed(other)}; move it away, or name it by --teacher-checkpoint")
    batches = plan.batches("teacher")[1]
    accuracy = evaluate(placed(teacher, plan.device), batches, plan.autocast())
    images = len(batches) * batches.batch_size if batches.drop_last else batches.count
    whole = "the test set" if images == batches.count else f"{images:,} images of the test set"
    how = ""
    if found:
        where = f"{found.get('dataset')} by {found.get('recipe')}, {counted(found.get('epochs', 0), 'epoch')}, seed {found.get('seed')}"
        how = f" (trained on {where}, {found.get('precision')}, {found.get('device')})"
    say(f"teacher: {name} from {path}{how}, {accuracy:.2f} % on {whole}")
    chance = 1 / plan.data.classes
    if accuracy / 100 <= chance + 2 * (chance * (1 - chance) / images) ** 0.5:  # what guessing reaches, and its spread
        say(f"teacher: warning: that is chance for {plan.data.classes} classes: there is nothing to learn from it")
    return teacher, accuracy


class Waiting:
    """Called again and again while another command trains the teacher."""

    def __init__(self, path: Path):
        self.path, self.told = path, 0.0

    def __call__(self) -> None:
        if not self.told:
            say(f"teacher: another process trains {self.path}; waiting for it")
        if time.monotonic() - self.told > 60:
            self.told = time.monotonic()
            distributed.order("wait")  # processes that hear nothing for half an hour take the first one for lost


def train(plan: Plan, role: str, run: Run, method: Definition, teacher: nn.Module | None, teacher_acc: float | None) -> dict[str, Any]:
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
    first = names.index(state["phase"]) if state else 0
    run.curves.earlier = names[:first]
    for phase in phases[first:]:
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
            try:
                row = records.append(plan.settings.output, row)
            except UserError as error:
                if role == "student":
                    raise
                say(f"{title}: {error}")  # its weights are there: no reason to keep its student waiting
                return row
        except KeyboardInterrupt as stop:
            line = how_far(label, name, loop, run.folder, plan.settings.output)
            raise Interrupted(line, getattr(stop, "status", 130)) from None
        finally:
            progress.close()
    if role == "student" and plan.settings.pictures:  # after the row: nothing that fails here can lose it
        loop.student.load_state_dict(loop.weights()[0])
        pictures.keep(plan, run.folder, loop.student, teacher)
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
    changed = plan.options() if role == "student" else []
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
        "processes": plan.processes,
        "reported_acc": f"{loop.weights()[1]['test_acc']:.2f}",
        "teacher_acc": "" if teacher_acc is None else f"{teacher_acc:.2f}",
        "train_acc": f"{last['train_acc']:.2f}",
        "losses": " ".join(f"{term}={last[term]:.4g}" for term in loop.distillation.names),
        "overrides": " ".join([*(f"{key}={written(value)}" for key, value in settings.overrides.items()), *changed]),
        "teacher_seed": plan.seed_of("teacher") if taught and file is None else "",
        "deterministic": "yes" if settings.deterministic else "no",
        "compiled": "yes" if plan.compiled else "no",
        "cuda_graph": "yes" if plan.captured else "no",
        "environment": " ".join(environment()),
        "teacher_checkpoint": file if taught and file is not None else "",
        "folder": run.folder.name,
    }


def how_far(label: str, phase: str, loop: Loop, folder: Path, output: Path) -> str:
    """One line for somebody who stopped the run, by what its files hold: the signal may have come while one was written."""
    trained, epochs, saved, best, added = len(loop.history), loop.recipe.epochs, 0, "", False
    with suppress(WeightsError):
        state = read_checkpoint(folder / CHECKPOINT)
        saved = state["epoch"] if state["phase"] == phase else 0
        if phase == "main":
            best = f" and the best ({read_checkpoint(folder / 'best.pt')['acc']:.2f} %)"
    with suppress(UserError):
        added = any(row.get("folder") == folder.name for row in records.read_rows(output)[1])
    if saved < trained:
        where = f"in epoch {trained} of {epochs}, while it was saved"
    elif trained < epochs:
        where = f"in epoch {trained + 1} of {epochs}, step {loop.step} of {len(loop.batches)}"
    else:
        where = "after its last epoch"
    kept = f"the weights of epoch {saved}{best} are in {folder}" if saved else "no epoch was saved"
    rest = "its row was added" if added else "no row was added; --resume goes on"
    return f"{label} stopped {where}; {kept}; {rest}"
