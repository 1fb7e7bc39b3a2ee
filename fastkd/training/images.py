"""The images of a run: their sizes, and how those of a folder are read."""

from __future__ import annotations

import os

from fastkd.data import Dataset
from fastkd.data.feed import Feed
from fastkd.errors import UserError
from fastkd.methods import Definition
from fastkd.models.normalization import Normalization
from fastkd.training import distributed
from fastkd.training.given_weights import Given
from fastkd.training.recipes import Recipe, normalization_of

SIDE = 32
"""The side of the images of all sets in memory."""


class Images(Given):
    """The part of the settings that concerns the images."""

    recipe: Recipe
    method: Definition

    def check_images(self) -> None:
        """Raises UserError for a size or a number of workers that is too small."""
        for name in ("image_size", "student_size", "teacher_size"):
            size = getattr(self.settings, name)
            if size is not None and size < 8:
                raise UserError(f"--{name.replace('_', '-')} is {size}, wanted at least 8")
        if (self.settings.workers or 0) < 0:
            raise UserError(f"--workers is {self.settings.workers}, wanted at least 0")

    def side(self, role: str) -> int:
        """The side of the square images that the student or the teacher gets."""
        if isinstance(self.data, Dataset):
            return SIDE
        own = self.settings.student_size if role == "student" else self.settings.teacher_size
        return own or self.settings.image_size or 224

    def image_shape(self, role: str) -> tuple[int, int, int]:
        return 3, self.side(role), self.side(role)

    def normalization(self) -> Normalization:
        """(mean, std) a channel."""
        return normalization_of(self.recipe.normalization, self.data)

    def feed(self, role: str) -> Feed:
        """How the images of this role's training are read: a student's with the teacher's beside them, where
        those have another size.
        """
        sides = [self.side(role)]
        if role == "student" and self.method.needs_teacher and self.side("teacher") != sides[0]:
            sides.append(self.side("teacher"))
        return Feed(tuple(sides), self.workers, self.settings.on_bad_image or "stop")

    @property
    def workers(self) -> int:
        """Processes that read files, for each process that trains."""
        if self.settings.workers is not None:
            return self.settings.workers
        there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(8, there // distributed.share()[1]))

    @property
    def test_batch(self) -> int:
        """Images of a test batch: about as many pixels, whatever the size of the images."""
        return max(50, 500 * SIDE**2 // self.side("student") ** 2)
