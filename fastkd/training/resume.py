"""The runs that lie under a folder, and which of them ``--resume`` means."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.models import WeightsError, read_checkpoint
from fastkd.training import results
from fastkd.training.config import Config
from fastkd.training.settings import AUTO

CHECKPOINT = "last.pt"

Differences = dict[str, tuple[Any, Any]]
TEACHER = {"teacher_seed", "teacher_weights", "teacher_checkpoint"}
"""The keys of an identity that concern a teacher, except its architecture."""


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> Differences:
    """(found, wanted) under each key whose values differ."""
    pairs = {key: (found.get(key), wanted.get(key)) for key in [*wanted, *found]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def in_words(other: Differences) -> str:
    """The differences as text; of values that are dicts, such as the user's files, only what differs."""
    parts = []
    for key, (found, wanted) in other.items():
        if isinstance(found, dict) and isinstance(wanted, dict):
            parts.append(in_words(differences(found, wanted)))
        else:
            parts.append(f"{key} {found} instead of {wanted}")
    return ", ".join(parts)


def differences_of(folder: Path, config: dict[str, Any], identity: dict[str, Any]) -> Differences:
    """How the run in ``folder`` differs from ``identity``. A teacher whose file was moved is the same."""
    other = differences(config["identity"], identity)
    if identity.get("teacher_weights") and other.keys() <= TEACHER and other:
        with suppress(WeightsError):
            if read_checkpoint(folder / CHECKPOINT).get("taught_by") == identity["teacher_weights"]:
                return {}
    return other


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config of a run that can be resumed; None for anything else, versions without identities too."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and isinstance(config.get("identity"), dict) else None


def runs_of(output: Path, identity: dict[str, Any]) -> tuple[list[Path], list[Path]]:
    """Runs of that identity under ``output``: (unfinished, finished), those without and with a row in its
    table. Raises UserError.
    """
    done = {row.get("folder") for row in results.read_rows(output)[1]}
    found = [path for path, config in all_runs(output) if not differences_of(path, config, identity)]
    return [path for path in found if path.name not in done], [path for path in found if path.name in done]


def all_runs(output: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, config) of every run under ``output``."""
    paths = [path.parent for path in sorted(output.glob("*/config.json"))]
    return [(path, config) for path in paths if (config := read_config(path)) is not None]


def choose(config: Config) -> tuple[dict[str, str] | None, Path | None]:
    """(the finished run's row that ends ``--resume auto``, the folder to go on with). Raises UserError."""
    if config.settings.resume is None:
        return None, None
    folder = find_run(config)
    return (finished(config) if folder is None and config.settings.resume == AUTO else None), folder


def finished(config: Config) -> dict[str, str] | None:
    """The row of the latest finished run of this configuration, if there is one. Raises UserError."""
    done = [path.name for path in runs_of(config.settings.output, config.identity("student"))[1]]
    rows = [row for row in results.read_rows(config.settings.output)[1] if row.get("folder") in done]
    return rows[-1] if rows else None


def nothing_to_resume(config: Config) -> UserError:
    """The error that no run of this configuration is unfinished; it names a finished or similar one."""
    output, identity = config.settings.output, config.identity("student")
    row, rest = finished(config), "without --resume it begins"
    if row is not None:
        rest = f"{row['folder']} is finished"
    else:
        done = {row.get("folder") for row in results.read_rows(output)[1]}
        left = [
            (path, about)
            for path, about in all_runs(output)
            if path.name not in done and about.get("trained") != "teacher"
        ]
        found = [(differences_of(path, about, identity), path.name) for path, about in left]
        if found:
            other, name = min(found, key=lambda pair: len(pair[0]))
            rest = f"the nearest is {name}: {in_words(other)}; {rest}"
    return UserError(f"--resume: no unfinished run of this configuration under {output}; {rest}")


def find_run(config: Config) -> Path | None:
    """The folder that ``--resume`` means; None where only the teacher's training had begun. Raises UserError:
    none, several.

    ``auto`` takes the one that came furthest (one identity ends alike), or None.
    """
    output, wanted = config.settings.output, config.settings.resume
    if wanted and wanted != AUTO:
        folder = next((path for path in (Path(wanted), output / wanted) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"--resume {wanted}: no such folder, neither here nor under {output}")
        if folder.name in {row.get("folder") for row in results.read_rows(output)[1]}:
            raise UserError(
                f"--resume {wanted}: that run is finished; its row is in {output / 'results.csv'}"
            )
        return folder
    found, _ = runs_of(output, config.identity("student"))
    if wanted == AUTO:
        return max(found, key=epochs_of, default=None)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"--resume: {len(found)} unfinished runs of this configuration under {output}: {names}; name one:"
            " --resume FOLDER"
        )
    if not found and not unfinished_teachers(config):
        raise nothing_to_resume(config)
    return found[0] if found else None


def unfinished_teachers(config: Config) -> list[Path]:
    """Unfinished trainings of the teacher that this plan waits for; where the teacher is there, those that
    lack only their row.
    """
    if not config.method.needs_teacher or config.settings.teacher_checkpoint is not None:
        return []
    found, _ = runs_of(config.settings.output, config.identity("teacher"))
    there = config.teacher_path().exists()
    return [folder for folder in found if not there or epochs_of(folder) == config.recipe.epochs]


def choose_teacher(config: Config, path: Path) -> tuple[bool, Path | None]:
    """(whether the teacher of ``path`` is still to be trained, the unfinished training to go on with, if
    there is one).
    """
    begun = unfinished_teachers(config) if config.settings.resume is not None else []
    needed = config.settings.teacher_checkpoint is None and not path.exists()
    # all of one identity end alike, so the one that came furthest serves
    return needed or bool(begun), max(begun, key=epochs_of, default=None)


def epochs_of(folder: Path) -> int:
    """How many epochs its log has."""
    try:
        return len(results.read_table(folder / "epochs.csv", ("epoch",))[1])
    except UserError:
        return 0
