"""How to train, by name. Every field has a flag that overrides it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from fastkd.data.feed import AnyDataset
from fastkd.data.loader import PAD_MODES
from fastkd.errors import UserError


def _field(text: str, default: Any, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


def _at(epochs: int, *drops: int) -> tuple[float, ...]:
    return tuple(drop / epochs for drop in drops)


@dataclass(frozen=True)
class Recipe:
    """SGD with a learning rate that drops at milestones.

    ``milestones`` are fractions of the run, so they keep their place when ``epochs`` is overridden: 5 epochs
    of the published [100, 150] of 200 drop after 2.5 and 3.75 epochs. ``init_epochs`` shrinks with ``epochs``
    for the same reason.
    """

    epochs: int = _field("passes over the training set", 200)
    batch_size: int = _field("images of one process per step", 128)
    lr: float = _field("learning rate at the start", 0.1)
    milestones: tuple[float, ...] = _field(
        "where the learning rate drops, as fractions of the run: 0.5,0.75", _at(200, 100, 150)
    )
    gamma: float = _field("factor of the learning rate at each milestone", 0.1)
    momentum: float = _field("momentum of SGD", 0.9)
    nesterov: bool = _field("Nesterov's momentum", False)
    new_optimizer: bool = _field("start with zero momentum at each drop, as a new optimizer does", False)
    weight_decay: float = _field("weight decay of SGD, on every parameter", 1e-4)
    pad_mode: str = _field("what the images are padded with before the crop", "reflect", PAD_MODES)
    drop_last: bool = _field("leave out the last, smaller training batch", False)
    drop_last_test: bool = _field(
        "shuffle the test set once, the same way in every run, and leave out the last, smaller batch", False
    )
    teacher_mode: str = _field(
        "batch norm of the teacher: its running averages, or each batch's own", "eval", ("eval", "train")
    )
    normalization: str = _field(
        "constants: the set's own (KD-Zoo's), OFD's for both CIFAR sets, RepDistiller's for CIFAR-100",
        "own",
        ("own", "ofd", "repdistiller"),
    )
    preset: str = _field("the project whose coefficients the losses take", "hankyul2")
    report: str = _field("the epoch whose accuracy is the result", "best", ("best", "last"))
    init_epochs: int = _field(
        "epochs of a first phase with the loss of FSP alone, or of FitNet with phases=2, before cross-entropy"
        " alone; 0: both together",
        0,
    )
    init_lr: float = _field("learning rate at the start of that phase", 0.05)
    init_milestones: tuple[float, ...] = _field("where that rate drops, as fractions of that phase", ())


# How the published descriptions are read: "at epoch n" and "after n" are both after n whole epochs
# (szagoruyko's code drops one earlier); where they are silent no batch is dropped, the teacher is in eval
# mode, the best epoch is the result. An initialization phase has the recipe's gamma, momentum and weight
# decay, moves what its loss reaches (not the classifier, nor a wide ResNet's last batch norm), and leaves the
# second phase no momentum (KD-Zoo's does). Where there is no FSP (szagoruyko, mdistiller, SAKD) it is
# RepDistiller's, phases included.
RECIPES: dict[str, Recipe] = {
    # hankyul2/KnowledgeDistillation: its teacher is left in train mode, its accuracies are over 9,984 images
    "hankyul2": Recipe(drop_last=True, drop_last_test=True, teacher_mode="train"),
    # szagoruyko/attention-transfer, momenta set to zero at each drop
    "zagoruyko": Recipe(
        milestones=_at(200, 60, 120, 160), gamma=0.2, weight_decay=5e-4, new_optimizer=True,
        normalization="ofd", preset="zagoruyko", init_epochs=30, init_lr=0.05,
    ),
    # HobbitLong/RepDistiller; its models of the first phase keep the learning rate
    "repdistiller": Recipe(
        240, 64, 0.05, _at(240, 150, 180, 210), weight_decay=5e-4, pad_mode="zero",
        normalization="repdistiller", preset="repdistiller", report="last", init_epochs=30, init_lr=0.05,
    ),
    # megvii-research/mdistiller: RepDistiller's, but for the epoch it reports
    "mdistiller": Recipe(
        240, 64, 0.05, _at(240, 150, 180, 210), weight_decay=5e-4, pad_mode="zero",
        normalization="repdistiller", preset="mdistiller", init_epochs=30, init_lr=0.05,
    ),
    # AberHu/Knowledge-Distillation-Zoo: all students of a seed begin alike, as in every recipe here
    "kdzoo": Recipe(
        nesterov=True, preset="kdzoo", init_epochs=50, init_lr=0.01, init_milestones=_at(50, 30, 40)
    ),
    # CRGuan/SAKD: momentum 0.8, and a teacher in train mode as in OFD
    "sakd": Recipe(
        240, 64, 0.05, _at(240, 150, 180, 210), momentum=0.8, nesterov=True, new_optimizer=True,
        weight_decay=5e-4, teacher_mode="train", normalization="ofd", preset="sakd",
        init_epochs=30, init_lr=0.05,
    ),
    # szagoruyko/attention-transfer's imagenet.py: AT at the four stages of ResNets, momenta set to zero at
    # each drop
    "imagenet": Recipe(
        100, 256, milestones=_at(100, 30, 60, 90), new_optimizer=True, preset="zagoruyko",
    ),
    # small batches, since an epoch of 1,437 images has few steps
    "digits": Recipe(
        8, 32, 0.05, (0.5, 0.8), nesterov=True, weight_decay=5e-4, pad_mode="zero", drop_last=True
    ),
}  # fmt: skip


# teacher and student on CIFAR-100, by SAKD's letters (those of its README; its code's own flag swaps f, g and
# h)
SETTINGS: dict[str, tuple[str, str]] = {
    "a": ("resnet56", "resnet20"),
    "b": ("resnet56", "resnet32"),
    "c": ("resnet110", "resnet20"),
    "d": ("resnet110", "resnet32"),
    "e": ("resnet110", "resnet56"),
    "f": ("wrn_40_2", "wrn_16_2"),
    "g": ("resnet110", "wrn_16_1"),
    "h": ("resnet110", "wrn_16_2"),
    "i": ("wrn_40_2", "resnet32"),
    "j": ("wrn_40_2", "resnet56"),
}

_OFD = (
    tuple(value / 255 for value in (125.3, 123.0, 113.9)),
    tuple(value / 255 for value in (63.0, 62.1, 66.7)),
)
# by name and data set; a set that is not here keeps its own
NORMALIZATIONS = {
    ("ofd", "cifar10"): _OFD,
    ("ofd", "cifar100"): _OFD,
    ("repdistiller", "cifar100"): ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def normalization_of(name: str, dataset: AnyDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) a channel, by a recipe's field ``normalization``; else the set's own."""
    return NORMALIZATIONS.get((name, dataset.name), (dataset.mean, dataset.std))


def get_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """The recipe ``name`` with the fields in ``overrides`` replaced. Raises UserError for a name or a value
    that cannot be.
    """
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not known; known: {', '.join(RECIPES)}")
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    growing = "growing fractions of the run between 0 and 1"
    for key, fits, wanted in (
        ("epochs", recipe.epochs >= 1, "at least 1"),
        # batch norm has no variance in a batch of one
        ("batch_size", recipe.batch_size >= 2, "at least 2"),
        ("init_epochs", recipe.init_epochs >= 0, "at least 0"),
        ("lr", 0 < recipe.lr < math.inf, "a positive number"),
        ("init_lr", 0 < recipe.init_lr < math.inf, "a positive number"),
        ("weight_decay", 0 <= recipe.weight_decay < math.inf, "a non-negative number"),
        # from 1 on nothing of a gradient fades
        ("momentum", 0 <= recipe.momentum < 1, "at least 0 and less than 1"),
        ("gamma", 0 < recipe.gamma <= 1, "more than 0 and at most 1"),
        ("milestones", _are_growing(recipe.milestones), growing),
        ("init_milestones", _are_growing(recipe.init_milestones), growing),
    ):
        if not fits:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(recipe, key)}, wanted {wanted}")
    if recipe.nesterov and recipe.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    if "init_epochs" not in overrides and recipe.init_epochs:
        scaled = max(1, round(recipe.init_epochs * recipe.epochs / RECIPES[name].epochs))
        recipe = dataclasses.replace(recipe, init_epochs=scaled)
    return recipe


def _are_growing(fractions: tuple[float, ...]) -> bool:
    return all(0 < fraction < 1 for fraction in fractions) and list(fractions) == sorted(fractions)


def drops(recipe: Recipe, step: int, steps: int) -> int:
    """How many milestones of a run of ``steps`` steps lie at or before ``step`` (from 0)."""
    # a fraction times a whole number may come out a rounding above the whole number that is meant
    return sum(step >= fraction * steps - 1e-6 for fraction in recipe.milestones)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of a run of ``steps`` steps."""
    return recipe.lr * recipe.gamma ** drops(recipe, step, steps)
