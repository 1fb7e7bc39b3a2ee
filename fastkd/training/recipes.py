"""How to train, by name. Every field has a flag that overrides it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastkd.training.batches import PAD_MODES
from fastkd.training.errors import UserError


def _field(text: str, default: Any, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """SGD with a learning rate that drops at milestones.

    ``milestones`` are fractions of the run, so they keep their place when ``epochs`` is overridden: 5 epochs of the published [100, 150]
    of 200 drop after 2.5 and 3.75 epochs.
    """

    epochs: int = _field("passes over the training set", 200)
    batch_size: int = _field("images a step", 128)
    lr: float = _field("learning rate at the start", 0.1)
    milestones: tuple[float, ...] = ()
    gamma: float = _field("factor of the learning rate at each milestone", 0.1)
    momentum: float = _field("of SGD", 0.9)
    nesterov: bool = _field("Nesterov's momentum", False)
    weight_decay: float = _field("of SGD, on every parameter", 1e-4)
    pad_mode: str = _field("what the images are padded with before the crop", "reflect", PAD_MODES)
    drop_last: bool = _field("leave out the last, smaller training batch", True)
    drop_last_test: bool = _field("leave out the last, smaller test batch, as hankyul2 does", False)
    teacher_mode: str = _field("batch norm of the teacher: eval as usual, or train as hankyul2 leaves it", "eval", ("eval", "train"))
    normalization: str = _field("constants: the set's own, or OFD's and SAKD's for both CIFAR sets", "own", ("own", "ofd"))
    preset: str = _field("whose coefficients the method's losses take", "hankyul2")


RECIPES: dict[str, Recipe] = {
    # hankyul2/KnowledgeDistillation, MultiStep [100, 150]. Its teacher in train mode and its test over 9,984 images are flags here.
    "hankyul2": Recipe(epochs=200, batch_size=128, lr=0.1, milestones=(0.5, 0.75)),
    # small batches, since an epoch of 1,437 images has few steps
    "digits": Recipe(8, 32, 0.05, (0.5, 0.8), nesterov=True, weight_decay=5e-4, pad_mode="zero"),
}


def get_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """The recipe ``name`` with the fields in ``overrides`` replaced. Raises UserError for a name or a value that cannot be."""
    if name not in RECIPES:
        raise UserError(f"recipe {name!r} is not known; known: {', '.join(RECIPES)}")
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    for key, low in (("epochs", 1), ("batch_size", 2)):  # batch norm has no variance in a batch of one
        if getattr(recipe, key) < low:
            raise UserError(f"--{key.replace('_', '-')} is {getattr(recipe, key)}, wanted at least {low}")
    for key in ("lr", "gamma", "momentum", "weight_decay"):
        value = getattr(recipe, key)
        if not 0 <= value < float("inf") or (key == "lr" and value == 0):
            raise UserError(f"--{key.replace('_', '-')} is {value}, wanted a {'positive' if key == 'lr' else 'non-negative'} number")
    if recipe.nesterov and recipe.momentum == 0:
        raise UserError("--nesterov needs a --momentum above 0")
    return recipe


NORMALIZATIONS = {"ofd": (tuple(value / 255 for value in (125.3, 123.0, 113.9)), tuple(value / 255 for value in (63.0, 62.1, 66.7)))}


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The rate of step ``step`` (from 0) of a run of ``steps`` steps."""
    return recipe.lr * recipe.gamma ** sum(step >= fraction * steps for fraction in recipe.milestones)
