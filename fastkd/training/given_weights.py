"""The weights that a command gives to its networks, by their fingerprints: a file may have moved."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from fastkd.data.feed import AnyDataset
from fastkd.errors import UserError
from fastkd.models import WeightsError, create_model, fingerprint, load_weights
from fastkd.training.settings import Models, Settings
from fastkd.training.teacher_images import identity_of


class Given:
    """What ``--teacher-checkpoint`` and ``--student-checkpoint`` hold."""

    settings: Settings
    models: Models
    data: AnyDataset

    @property
    def all_teachers(self) -> list[tuple[str, Path | None]]:
        """(model, checkpoint) of each teacher."""
        return [(self.models.teacher, self.settings.teacher_checkpoint), *self.settings.more_teachers]

    @cached_property
    def teacher_files(self) -> list[tuple[str | None, dict[str, Any]]]:
        """For each teacher (fingerprint of the weights in its ``--teacher-checkpoint``, None without one;
        config of the run of fastkd that trained it, {} if there was none). Raises UserError.
        """
        return [self._read("teacher", name, file) for name, file in self.all_teachers]

    @property
    def teacher_weights(self) -> str | None:
        """The fingerprint of the first teacher's weights; None where the run trains it. Raises UserError."""
        return self.teacher_files[0][0]

    @property
    def more_weights(self) -> list[list[str | None]]:
        """(model, fingerprint) of each teacher but the first. Raises UserError."""
        names = [name for name, _ in self.settings.more_teachers]
        return [[name, found] for name, (found, _) in zip(names, self.teacher_files[1:], strict=True)]

    @cached_property
    def student_weights(self) -> str | None:
        """The fingerprint of what ``--student-checkpoint`` holds; None without one. Raises UserError."""
        return self._read("student", self.models.student, self.settings.student_checkpoint)[0]

    def _read(self, role: str, model: str, file: Path | None) -> tuple[str | None, dict[str, Any]]:
        if file is None:
            return None, {}
        network = create_model(model, self.data.classes)
        try:
            about: Any = load_weights(network, file, say=_nothing).get("config")
        except WeightsError as error:
            raise UserError(f"--{role}-checkpoint {error}") from None
        return fingerprint(network), about if identity_of(about) else {}


def _nothing(text: str) -> None:
    """Which of several sets of weights is taken is said once, when the network that is used loads them."""
