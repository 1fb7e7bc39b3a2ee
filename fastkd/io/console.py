"""Output of a command: on the screen, and in the logs of the runs in progress."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastkd.errors import UserError, one_line

LOG = "log.txt"
WIDTH = 100
"""Columns of the screen at a run's start."""
TOGETHER = "\u00a0"
"""A space at which no line is broken."""

_logs: list[Path] = []  # open logs; while a teacher is trained, both its run's and its student's
_silent = False  # of several processes only the first prints
_untold: list[str] = []  # lines about a screen that failed before any log was open


def counted(number: int, what: str) -> str:
    """1, "epoch" -> "1 epoch"; 2 -> "2 epochs"."""
    return f"{number} {what}{'s' * (number != 1)}"


def fitted(screen: str) -> str:
    """The lines of a screen, broken where they are wider than 100 columns. A path is never cut."""
    whole: Any = {"subsequent_indent": " " * 9, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, WIDTH, **whole) for line in screen.splitlines()).replace(
        TOGETHER, " "
    )


def say(text: str, shown: str | None = None) -> None:
    """Prints ``text`` and adds it to every open log. ``shown``: what is printed instead, nothing for ""."""
    if _silent:
        return
    if shown != "":
        print(text if shown is None else shown, flush=True)
    for path in list(_logs):
        _note(path, text)


def silent() -> bool:
    """Whether this process prints nothing."""
    return _silent


@contextmanager
def silenced(silent: bool) -> Iterator[None]:
    """Inside, nothing is printed or logged if ``silent``."""
    global _silent
    before, _silent = _silent, silent
    try:
        yield
    finally:
        _silent = before


def _note(path: Path, text: str) -> None:
    """Adds a line to an open log. A log that cannot be written is closed with a message: training goes on."""
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")
    except OSError as error:
        _logs.remove(path)
        print(f"{path} cannot be written: {error.strerror or error}; going on without it", flush=True)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Inside, what :func:`say` prints is added to ``folder``/log.txt, and so is an error that ends the block.
    An existing log is continued.
    """
    path = folder / LOG
    _logs.append(path)
    try:
        _note(path, f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['python', *sys.argv])}")
        while _untold and path in _logs:
            _note(path, _untold.pop(0))
        yield
    except BaseException as error:
        if path in _logs:
            _note(
                path,
                f"# {time.strftime('%Y-%m-%d %H:%M:%S')} ended: {one_line(error) or type(error).__name__}",
            )
        raise
    finally:
        if path in _logs:
            _logs.remove(path)


@contextmanager
def noted_in(folders: Collection[Path]) -> Iterator[None]:
    """Inside, of several runs in progress only the logs in ``folders`` get what :func:`say` prints."""
    before, mine = list(_logs), [path for path in _logs if path.parent in folders]
    _logs[:] = mine
    try:
        yield
    finally:
        given_up = [path for path in mine if path not in _logs]
        _logs[:] = [path for path in before if path not in given_up]


class Screen:
    """stdout or stderr, but writing to it never fails.

    Characters that the stream cannot encode become "?". When a write fails, as for a closed pipe or a full
    disk, the stream is given up with one line in the log. Later output is lost, and ``error`` says why.
    """

    def __init__(self, stream: Any, name: str):
        self.stream = _sink() if stream is None else stream
        self.name = name
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: a stream that somebody closed
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        try:
            return bool(self.stream.isatty())
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _give_up(self, error: OSError | ValueError) -> None:
        self.error = error
        sink = _sink()
        if self.stream in (sys.__stdout__, sys.__stderr__):
            # what its buffer holds would fail again when the interpreter ends
            with suppress(OSError, ValueError):
                os.dup2(sink.fileno(), self.stream.fileno())
        self.stream = sink
        reason = getattr(error, "strerror", None) or error
        text = f"{self.name} cannot be written: {reason}; going on without it"
        for path in list(_logs):
            _note(path, text)
        if not _logs:
            _untold.append(text)


def _sink() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def delivered() -> None:
    """Raises UserError if something could not be printed, other than for want of a reader (``| head``)."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise UserError(f"stdout cannot be written: {getattr(error, 'strerror', None) or error}")


@contextmanager
def screens() -> Iterator[Screen]:
    """Inside, stdout (which it gives) and stderr are each a :class:`Screen`, for libraries too."""
    if isinstance(sys.stdout, Screen):
        yield sys.stdout
        return
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # closed: the next file to be opened, a checkpoint maybe, would be what C++ libraries print to
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Screen(sys.stdout, "stdout"), Screen(sys.stderr, "stderr")
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        _untold.clear()
