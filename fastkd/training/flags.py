"""Flags that would change nothing. They are refused, since whoever gives one expects an effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastkd.data import choose_dataset
from fastkd.errors import UserError
from fastkd.methods import define
from fastkd.training.recipes import NORMALIZATIONS, get_recipe
from fastkd.training.settings import FOLDERS, Settings, recipe_of, resolve


def without_idle(each: Sequence[Settings]) -> list[Settings]:
    """Runs of one command, each without the flags that it does not read. Raises UserError for a flag that
    none of them reads.

    ``--teacher`` is never refused, since a baseline belongs to a pair of networks, nor is ``--data``, which
    says where to look.
    """
    idle = [idle_flags(one) for one in each]
    for name, why in idle[0].items():
        if all(name in others for others in idle):
            raise UserError(f"--{name.replace('_', '-')} does nothing here: {why}")
    left = []
    for one, unread in zip(each, idle, strict=True):
        read = {key: value for key, value in one.overrides.items() if key not in unread}
        changed: dict[str, Any] = {name: None for name in unread if name not in one.overrides}
        left.append(dataclasses.replace(one, overrides=read, **changed))
    return left


def idle_flags(settings: Settings) -> dict[str, str]:
    """The flags that are given and that such a run does not read, by name, and why. Raises UserError."""
    dataset = choose_dataset(resolve(settings).dataset, settings.data)[0]
    recipe = get_recipe(recipe_of(settings, dataset), settings.overrides)
    try:
        definition = define(settings.method, preset=recipe.preset, words=settings.options)
    except ValueError:
        return {}  # Config says what is known
    method, phases = f"--method {settings.method}", definition.initializes
    implied = (settings.teacher, settings.student, settings.dataset, settings.recipe)
    constants = recipe.normalization == "own" or (recipe.normalization, dataset) in NORMALIZATIONS
    rates = recipe.milestones or (phases and recipe.init_epochs and recipe.init_milestones)
    taught = ("teacher_checkpoint", "teacher_seed", "teacher_mode", "preset")
    of_teachers = ("teacher_points", "more_points", "teacher_size", "join_teachers", "teacher_normalization")
    both = None not in (settings.student_size, settings.teacher_size)
    idle = {
        f"{method} has no teacher": (not definition.needs_teacher, (*taught, *of_teachers)),
        "it is for --dataset folder": (dataset != "folder", FOLDERS),
        "images of a folder are not padded": (dataset == "folder", ("pad_mode",)),
        "--student-size and --teacher-size are given": (both, ("image_size",)),
        "--teacher-checkpoint needs no training": (
            settings.teacher_checkpoint is not None,
            ("teacher_seed",),
        ),
        "a teacher that the run trains gets the images as they are": (
            settings.teacher_checkpoint is None,
            ("teacher_normalization",),
        ),
        f"{method} has no first phase": (not phases, ("init_epochs", "init_lr", "init_milestones")),
        "--init-epochs is 0": (not recipe.init_epochs, ("init_lr", "init_milestones")),
        "the learning rate has no milestones": (not rates, ("gamma", "new_optimizer")),
        "--momentum is 0": (recipe.momentum == 0, ("new_optimizer",)),
        f"{recipe.normalization} has no constants for {dataset}": (not constants, ("normalization",)),
        "teacher, student, data set and recipe are given": (None not in implied, ("setting",)),
    }
    found: dict[str, str] = {}
    for why, (unread, names) in idle.items():
        for name in names:
            if unread and (name in settings.overrides or getattr(settings, name, None) is not None):
                found.setdefault(name, why)
    return found
