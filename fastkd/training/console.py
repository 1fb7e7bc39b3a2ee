"""What a command says: on the screen, and in the logs of the runs that are under way."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = "log.txt"

_logs: list[Path] = []  # a teacher is trained within its student's run: both keep what is said


def counted(number: int, what: str) -> str:
    """1, "epoch" -> "1 epoch"; 2 -> "2 epochs"."""
    return f"{number} {what}{'s' * (number != 1)}"


def say(text: str) -> None:
    """Prints ``text`` and adds it to every open log."""
    print(text, flush=True)
    for path in list(_logs):
        _note(path, text)


def _note(path: Path, text: str) -> None:
    """Adds a line to an open log. One that cannot be written is told and left, since no training should end with it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        _logs.remove(path)
        print(f"{path} cannot be written: {error.strerror or error}; going on without it", flush=True)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Keeps in ``folder``/log.txt what is said until the end, and what the run ended with. A log that is there is continued."""
    path = folder / LOG
    _logs.append(path)
    try:
        _note(path, f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['python', *sys.argv])}")
        yield
    except BaseException as error:
        if path in _logs:
            _note(path, f"# {time.strftime('%Y-%m-%d %H:%M:%S')} ended: {' '.join(str(error).split()) or type(error).__name__}")
        raise
    finally:
        if path in _logs:
            _logs.remove(path)
