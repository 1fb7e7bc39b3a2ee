"""Data, recipes, the loop, checkpoints and records: everything that ``train.py`` calls."""

from fastkd.training.batches import Batches
from fastkd.training.datasets import DATASETS, Dataset, choose_dataset, load_dataset
from fastkd.training.errors import Interrupted, UserError
from fastkd.training.loop import Loop, evaluate
from fastkd.training.recipes import RECIPES, SETTINGS, Recipe, get_recipe
from fastkd.training.repeats import repeat
from fastkd.training.run import run
from fastkd.training.settings import PRECISIONS, Settings

__all__ = [
    "DATASETS", "PRECISIONS", "RECIPES", "SETTINGS", "Batches", "Dataset", "Interrupted", "Loop", "Recipe", "Settings", "UserError",
    "choose_dataset", "evaluate", "get_recipe", "load_dataset", "repeat", "run",
]  # fmt: skip
