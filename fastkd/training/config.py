"""What a run will do: the settings, checked against each other and the machine before any work begins."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastkd.data import Dataset, choose_dataset, load_dataset
from fastkd.data.feed import AnyDataset, testing, training
from fastkd.data.loader import AnyBatches
from fastkd.errors import UserError
from fastkd.methods import Definition, define
from fastkd.models.normalization import Normalization
from fastkd.models.specs import is_foreign
from fastkd.seeds import generator
from fastkd.training import distributed, results
from fastkd.training.device import can_compile, fast_bfloat16, find_device
from fastkd.training.networks import Networks
from fastkd.training.recipe_options import decided_options, options_of
from fastkd.training.recipes import Recipe, get_recipe
from fastkd.training.settings import PRECISIONS, Settings, recipe_of, resolve

WORTH_COMPILING = 500_000
"""Images of a process's run from which on its step is compiled: on 2 cores that saved time after some
150,000, whatever the network's depth.
"""


class Config(Networks):
    """The settings with every choice made, the data in memory, and what is built of them.

    The constructor raises UserError for whatever cannot work. ``data``: the set that ``settings`` name, where
    it is in memory.
    """

    def __init__(self, settings: Settings, data: AnyDataset | None = None):
        self.settings, self.models = settings, resolve(settings)
        name, self.why = choose_dataset(self.models.dataset, settings.data)
        self.recipe_name = recipe_of(settings, name)
        self.recipe: Recipe = get_recipe(self.recipe_name, settings.overrides)
        self.device, self.processes = find_device(settings.device), distributed.share()[1]
        if settings.precision not in ("auto", *PRECISIONS):
            raise UserError(
                f"precision {settings.precision!r} is not known; known: auto, {', '.join(PRECISIONS)}"
            )
        self.asked_precision = settings.precision
        if settings.precision == "auto":  # by what the device has, never by a clock: the result depends on it
            chosen = "bf16" if fast_bfloat16(self.device) else "fp32"
            self.settings = settings = dataclasses.replace(settings, precision=chosen)
        brought, self.notes = options_of(self.recipe_name, settings.method, settings.options)
        try:
            self.method = define(
                settings.method, preset=self.recipe.preset, words=[*brought, *settings.options]
            )
            decided = decided_options(self.recipe_name, self.method)
            self.method = dataclasses.replace(self.method, changes={**self.method.changes, **decided})
            if settings.recipe is None:  # an explicit one wins over what a method's authors change in theirs
                changed = self.method.recipe(dataclasses.asdict(self.recipe), settings.overrides)
                settings = dataclasses.replace(settings, overrides={**changed, **settings.overrides})
                self.recipe = get_recipe(self.recipe_name, settings.overrides)
        except ValueError as error:
            raise UserError(f"{error} (--recipe {self.recipe_name}, --preset {self.recipe.preset})") from None
        for term in self.method.terms:
            if getattr(term.options, "phases", 1) > 1 and not self.recipe.init_epochs:
                raise UserError(
                    f"--init-epochs is 0, but {term.name}.phases is {term.options.phases}: wanted at least 1"
                )
        self.settings = settings = dataclasses.replace(settings, method=self.method.name)
        self.check_images()
        if distributed.leads():  # the others write nothing, and may have no such folder on their machine
            results.read_rows(settings.output)
        self.data = load_dataset(name, settings.data) if data is None else data
        self.find_points()
        self.settings = settings = self.find_normalizations()
        self.check_networks()
        self.compiled, self.captured = self._how()
        parts = [len(self.data.train_labels) // self.processes] * self.drops_last("student")
        smallest = min([*parts, *[len(self.data.test_labels)] * self.recipe.drop_last_test], default=2**62)
        if self.recipe.batch_size > smallest:
            each = f" for each of {self.processes} processes" * (self.processes > 1)
            raise UserError(
                f"--batch-size is {self.recipe.batch_size}, but {name} has parts of only {smallest}"
                f" images{each}"
            )
        if distributed.leads():
            self.identity("student")  # reads the checkpoints that are given

    def _how(self) -> tuple[bool, bool]:
        """Whether steps are compiled, and replayed as a CUDA graph. Bits depend on it. Raises UserError."""
        settings, cuda = self.settings, self.device.type == "cuda"
        images = self.recipe.epochs * len(self.data.train_labels) / self.processes
        names = [self.models.student, *(name for name, _ in self.all_teachers)]
        ours = not any(map(is_foreign, names))
        compiled = (
            # others may hold what does not compile as one graph
            images >= WORTH_COMPILING and ours and can_compile(self.device)
            if settings.compile is None
            else settings.compile
        )
        can = cuda and self.processes == 1 and isinstance(self.data, Dataset)
        if settings.cuda_graph and not can:
            raise UserError("--cuda-graph is for one process on a GPU, and images in memory")
        return compiled, can if settings.cuda_graph is None else settings.cuda_graph

    def phases(self, method: Definition) -> list[tuple[str, Recipe, Definition]]:
        """(name, recipe, method) of the phases of a training: "main", perhaps after "init"."""
        recipe = self.recipe
        if not method.initializes or not recipe.init_epochs:
            return [("main", recipe, method)]
        first = dataclasses.replace(
            recipe, epochs=recipe.init_epochs, lr=recipe.init_lr, milestones=recipe.init_milestones
        )
        return [("init", first, method.initialization()), ("main", recipe, method.after_initialization())]

    def drops_last(self, role: str) -> bool:
        """Whether a training leaves out an epoch's last, smaller batch."""
        return self.recipe.drop_last or (role == "student" and self.method.whole_batches)

    def batches(self, role: str, normalization: Normalization | None = None) -> tuple[AnyBatches, AnyBatches]:
        """The training and test batches of the student's or the teacher's training, normalized in its way or
        by ``normalization``.
        """
        data, recipe, feed = self.data, self.recipe, self.feed(role)
        normalization = normalization or self.normalization()
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        common: dict[str, Any] = {"device": self.device, "dtype": dtype}
        random: dict[str, Any] = {
            "seed": self.seed_of(role),
            "stream": role,
            "flip": data.flip,
            "pad_mode": recipe.pad_mode,
            "share": distributed.share(),
            "drop_last": self.drops_last(role),
        }
        train = training(data, normalization, feed, batch_size=recipe.batch_size, **random, **common)
        # an accuracy over all images does not depend on the batch; one over whole batches does
        size, order, tested = self.test_batch, None, feed._replace(sides=(self.side(role),))
        if recipe.drop_last_test:  # a set may be sorted, and what is left out must not be of one class
            order = torch.randperm(len(data.test_labels), generator=generator(0, "test order"))
            size = recipe.batch_size
        fields: dict[str, Any] = {"batch_size": size, "drop_last": recipe.drop_last_test, **common}
        return train, testing(data, normalization, tested, order, **fields)
