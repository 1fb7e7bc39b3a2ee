"""The weights that a command gives to its networks, by their fingerprints: a file may have moved."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from fastkd.data.feed import AnyDataset
from fastkd.errors import UserError
from fastkd.models import WeightsError, create_model, fingerprint, load_weights
from fastkd.training.settings import Models, Settings


class Given:
    """What ``--teacher-checkpoint`` and ``--student-checkpoint`` hold."""

    settings: Settings
    models: Models
    data: AnyDataset

    @cached_property
    def teacher_weights(self) -> str | None:
        """The fingerprint of what ``--teacher-checkpoint`` holds; None without one. Raises UserError."""
        return self._fingerprint("teacher", self.models.teacher, self.settings.teacher_checkpoint)

    @cached_property
    def more_weights(self) -> list[list[str | None]]:
        """(model, fingerprint) of each teacher but the first. Raises UserError."""
        more = self.settings.more_teachers
        return [[name, self._fingerprint("teacher", name, file)] for name, file in more]

    @cached_property
    def student_weights(self) -> str | None:
        """The fingerprint of what ``--student-checkpoint`` holds; None without one. Raises UserError."""
        return self._fingerprint("student", self.models.student, self.settings.student_checkpoint)

    def _fingerprint(self, role: str, model: str, file: Path | None) -> str | None:
        if file is None:
            return None
        network = create_model(model, self.data.classes)
        try:
            load_weights(network, file)
        except WeightsError as error:
            raise UserError(f"--{role}-checkpoint {error}") from None
        return fingerprint(network)
