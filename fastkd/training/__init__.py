"""Data, recipes, the loop, checkpoints and records: everything that ``train.py`` calls."""

from fastkd.data import DATASETS, Dataset, choose_dataset, load_dataset
from fastkd.data.loader import Batches
from fastkd.errors import UserError
from fastkd.training.evaluation import evaluate
from fastkd.training.experiment import run
from fastkd.training.recipes import RECIPES, SETTINGS, Recipe, get_recipe
from fastkd.training.repeats import repeat
from fastkd.training.settings import PRECISIONS, Settings
from fastkd.training.signals import Interrupted
from fastkd.training.trainer import Trainer

__all__ = [
    "DATASETS", "PRECISIONS", "RECIPES", "SETTINGS", "Batches", "Dataset", "Interrupted", "Recipe",
    "Settings", "Trainer", "UserError", "choose_dataset", "evaluate", "get_recipe", "load_dataset", "repeat",
    "run",
]  # fmt: skip
