"""The table of finished runs: results.csv, and the same for people in results.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.training.errors import UserError
from fastkd.training.files import locked, write
from fastkd.training.summary import SHOWN, cells, groups

COLUMNS = (
    "no", "method", "dataset", "student", "teacher", "start_time", "acc", "epoch", "nepoch", "lr", "batch_size",
    "last_acc", "seed", "recipe", "precision", "device", "seconds", "images_per_second", "fastkd", "processes",
    "reported_acc", "teacher_acc", "train_acc", "losses", "overrides", "teacher_seed",
    "teacher_checkpoint", "folder",
)  # fmt: skip


def read_rows(output: Path) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of ``output``/results.csv; a file that is not there has no rows. Raises UserError for one that is something else."""
    path = output / "results.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = list(reader.fieldnames or COLUMNS)
    except FileNotFoundError:
        return list(COLUMNS), []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if columns[:11] != list(COLUMNS[:11]):
        raise UserError(f"{path} has other columns than this command's ({','.join(columns[:3])}, ...); choose another --output")
    return columns + [name for name in COLUMNS if name not in columns], rows


def append(output: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Adds ``row`` under the next number, which it returns it with; both tables stay whole whenever killed. Raises UserError."""
    with locked(output / ".results.lock"):
        for half in output.glob(".results.*.tmp"):  # of a process that was killed: nobody else writes now
            half.unlink(missing_ok=True)
        columns, rows = read_rows(output)
        row = {"no": len(rows) + 1, **row}
        write(output / "results.md", markdown(columns, [*rows, row]) + means([*rows, row]))
        write(output / "results.csv", table(columns, [*rows, row]))  # last: a run with a row here is finished
    return row


def means(rows: Sequence[Mapping[str, Any]]) -> str:
    """What several seeds of one configuration give together, as a section in Markdown; nothing where each has one."""
    lines = [dict(zip(SHOWN, cells(group), strict=True)) for group in groups(rows) if len(group.rows) > 1]
    return f"\n## Means over seeds\n\nMean ± sample standard deviation.\n\n{markdown(SHOWN, lines)}" if lines else ""


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, "")).replace("|", "\\|") for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
