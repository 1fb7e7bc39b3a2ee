"""The description of a run that is printed at its start."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import fastkd
from fastkd.data import Dataset
from fastkd.io.console import TOGETHER, counted
from fastkd.methods import title_of
from fastkd.models import create_model
from fastkd.training import attention_maps, tensorboard
from fastkd.training.config import Config
from fastkd.training.device import device_name, fast_bfloat16
from fastkd.training.recipes import RECIPES
from fastkd.training.teacher_images import in_words


def describe(config: Config) -> str:
    """One screen for the start of the run, which ``console.fitted`` breaks into short lines."""
    settings, models, data = config.settings, config.models, config.data
    student = sum(parameter.numel() for parameter in create_model(models.student, data.classes).parameters())
    teacher = sum(parameter.numel() for parameter in config.new_teacher().parameters())
    joined = f"; the mean of their {config.join_teachers}" * bool(settings.more_teachers)
    unread = () if isinstance(data, Dataset) else ("pad_mode",)
    fields = [
        f"{key}{TOGETHER}{_plain(value)}".replace(" ", TOGETHER)
        for key, value in dataclasses.asdict(config.recipe).items()
        if key not in unread
    ]
    phases = [
        f"{counted(recipe.epochs, 'epoch')} of {' + '.join(method.names)}"
        for _, recipe, method in config.phases(config.method)
    ]
    for term, preset in config.method.others_presets().items():
        why = (
            "by option"
            if f"{term}.preset" in config.method.changes
            else f"since {config.recipe.preset} has none"
        )
        phases.append(f"{title_of(term)} is {preset}'s, {why}")
    phases += config.options()
    added = (
        f"; {config.student_parameters:,} as {settings.method} trains, tests and saves it"
        * config.method.wraps
    )
    seeds = f"seed {settings.seed}"
    if config.teacher_seed is not None:
        seeds += f", of the teacher {config.teacher_seed}"
    device = [
        device_name(config.device),
        settings.precision,
        seeds,
        *["deterministic"] * settings.deterministic,
    ]
    device += [*["compiled"] * config.compiled, *["CUDA graph"] * config.captured]
    if config.processes > 1:
        batch = config.recipe.batch_size
        device.append(
            f"{config.processes} processes of {batch} images a step each, {batch * config.processes} together"
        )
    begun = f", begun with {settings.student_checkpoint}" * (settings.student_checkpoint is not None)
    lines = [
        ("fastkd", f"{fastkd.__version__}, torch {torch.__version__}"),
        ("method", f"{settings.method}: {'; '.join(phases)}"),
        ("student", f"{models.student}, {student:,} parameters{added}{begun}"),
        (
            "teacher",
            f"{config.teachers()}, {teacher:,} parameters{joined}" if config.method.needs_teacher else "none",
        ),
        *_points(config),
        ("data", _images(config)),
        ("recipe", f"{config.recipe_name}: {', '.join(fields)}"),
        ("device", ", ".join(device)),
        *(("note", text) for text in _notes(config)),
        ("losses", _implementations(config)),
        *(
            ("memory", f"{title_of(name)} keeps {size / 1e6:.1f} MB")
            for name, size in config.kept.items()
            if size > 1e6
        ),
        ("output", f"{settings.output}: tables, and a folder with {_records(config)}"),
        ("time", "expected at the end of the first epoch"),
    ]
    return "\n".join(f"{name:<9}{text}" for name, text in lines)


def _points(config: Config) -> list[tuple[str, str]]:
    """The stages of networks that do not show their own."""
    if not config.method.needs_teacher:
        return []
    told = [f"{role} {', '.join(points)}" for role, points in config.points.items() if points is not None]
    if any(points != config.points["teacher"] for points in config.more_points):
        told += [
            f"teacher {place} {', '.join(points or ('its own',))}"
            for place, points in enumerate(config.more_points, 2)
        ]
    return [("points", "; ".join(told))] if told else []


def _images(config: Config) -> str:
    data = config.data
    counts = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
    if isinstance(data, Dataset):
        return f"{data.name} ({config.why}), {counts}"
    sides = [f"{side}×{side}" for side in config.feed("student").sides]
    size = sides[0] if len(sides) == 1 else f"{sides[0]} for the student, {sides[1]} for the teacher"
    bad = config.feed("student").on_bad
    workers = counted(config.workers, "worker") + " in each process" * (config.processes > 1)
    return (
        f"{data.title} ({config.settings.data}), {counts} of {data.classes} classes, {size}, read by"
        f" {workers}; a bad image: {bad}"
    )


def _notes(config: Config) -> list[str]:
    """Notes on effects of the settings that the user may not have intended."""
    recipe, known, notes = config.recipe, RECIPES[config.recipe_name], [*config.notes]
    if config.method.whole_batches and _smaller_batch(config, recipe.drop_last):
        notes.append(
            f"{config.method.name} is built for whole batches: an epoch's last, smaller one is left out"
        )
    declared, own = config.declared["student"][0], config.normalization()
    if config.settings.student_checkpoint is not None and declared not in (None, own):
        notes.append(
            f"images are normalized by {in_words(own)}, and the published weights of"
            f" {config.models.student} want {in_words(declared)}"
        )
    for place, ((name, _), theirs) in enumerate(
        zip(config.all_teachers, config.teacher_normalizations, strict=True)
    ):
        if theirs is not None:
            why = "as its weights declare"
            if config.asked_normalization:
                why = "as asked for"
            elif config.teacher_files[place][1]:
                why = "as in the run that trained it"
            notes.append(
                f"the images of the teacher {name} are normalized by {in_words(theirs)}, {why}, those of the"
                f" student by {in_words(own)}; --teacher-normalization data makes them the same"
            )
    together = recipe.batch_size * config.processes
    if together != known.batch_size:
        text = (
            f"a step has {together} images; {config.recipe_name}'s learning rate of {known.lr} is for"
            f" {known.batch_size}"
        )
        each, rest = divmod(known.batch_size, config.processes)
        if config.processes > 1 and each >= 2 and not rest:  # what get_recipe takes
            text += f": --batch-size {each} in each of {config.processes} processes"
        notes.append(text)
    if config.asked_precision == "auto":
        notes.append(f"--precision auto takes {config.settings.precision} on this device")
    if config.settings.precision == "bf16" and fast_bfloat16(config.device) is False:
        what, slow = "this GPU", "slower than fp32"
        if config.device.type == "cpu":
            what, slow = (
                "this processor, which has neither AMX nor AVX512-BF16",
                "2 to 2.7 times slower than fp32",
            )
        notes.append(f"bf16 is emulated on {what}, and {slow}; --precision auto takes what is faster")
    return notes


def _implementations(config: Config) -> str:
    """Which implementation computes each loss, in batches of the run's size."""
    parts = []
    for name in config.method.names:
        eager, compiled = _backends(config, name, compiled=False), _backends(config, name, compiled=True)
        if not config.compiled or not eager:
            parts.append(f"{name} by {eager or 'plain PyTorch'}")
            continue
        smaller = _smaller_batch(config, config.recipe.drop_last or config.method.whole_batches)
        rest = f" ({eager} in an epoch's last, smaller batch)" if smaller and eager != compiled else ""
        parts.append(f"{name} by {compiled} in the compiled step{rest}")
    return ", ".join(parts)


def _backends(config: Config, term: str, compiled: bool) -> str:
    """Who serves the package's operations in a term of the loss; "" if it has none of them."""
    found = [call.backend(config.recipe.batch_size, compiled) for call in config.calls.get(term, [])]
    return " and ".join(dict.fromkeys(found))


def _smaller_batch(config: Config, dropped: bool) -> bool:
    """Whether an epoch ends with a smaller batch, which is not compiled."""
    return not dropped and len(config.data.train_labels) % (config.recipe.batch_size * config.processes) > 0


def _records(config: Config) -> str:
    """What will lie in the folder beside the weights, and what for want of a package will not."""
    parts = ["log", "epochs"]
    parts.append(
        "TensorBoard curves"
        if tensorboard.available()
        else "no TensorBoard curves (the package tensorboard is not installed)"
    )
    if config.settings.pictures:
        parts.append(
            "pictures" if attention_maps.available() else "no pictures (matplotlib is not installed)"
        )
    return ", ".join(parts)


def _plain(value: Any) -> Any:
    return " ".join(f"{part:.4g}" for part in value) or "none" if isinstance(value, tuple) else value
