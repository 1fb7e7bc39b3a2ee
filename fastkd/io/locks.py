"""Locks for file systems that have none: a file that only one process can create."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastkd.errors import UserError
from fastkd.io.console import say

PULSE = 10.0
"""Seconds after which the holder of a mark renews the mark's time."""

GONE = 120.0
"""Seconds after which a mark whose time was not renewed counts as left behind."""

_told = False
_held: set[str] = set()  # the marks of this process
# held while a mark and its entry in _held are made or removed, so that both always agree
_changing = threading.Lock()


@contextmanager
def marked(path: Path, reason: str = "") -> Iterator[bool]:
    """Holds the mark ``path``.held, a file beside the lock file ``path``, unless another process does. Gives
    whether it is held.

    The mark of a killed process stays behind. A mark therefore names its process and machine, and its time is
    renewed while it is held. The next process removes it once its holder is gone or its time is two minutes
    old. ``reason``: why there is no better lock, printed once. Raises UserError.
    """
    global _told
    if reason and not _told:
        _told = True
        stands = f"a file {path.name}.held stands for {path.name} while it is held"
        say(f"{path.parent} has no file locks ({reason}); {stands}")
    mark = path.with_name(f"{path.name}.held")
    with _changing:
        mine = _create(mark) or (_left(path, mark) and _create(mark))
        if mine:
            _held.add(str(mark))
    if not mine:
        yield False
        return
    done = threading.Event()
    pulse = threading.Thread(target=_live, args=(mark, done), daemon=True)
    pulse.start()
    try:
        yield True
    finally:
        done.set()
        pulse.join()
        with _changing:
            with suppress(OSError):
                mark.unlink()
            _held.discard(str(mark))


def _create(mark: Path) -> bool:
    try:
        with open(mark, "x", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {socket.gethostname()}")
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{mark} cannot be written: {error.strerror or error}") from None
    return True


def _live(mark: Path, done: threading.Event) -> None:
    while not done.wait(PULSE):
        with suppress(OSError):
            os.utime(mark)


def _left(path: Path, mark: Path) -> bool:
    """Removes a mark whose process is gone, and says whether it did."""
    try:
        holder = mark.read_text(encoding="utf-8")
        os.utime(path)  # both times are then of one clock, which may be a server's
        if not _gone(holder, mark) and path.stat().st_mtime - mark.stat().st_mtime < GONE:
            return False
        aside = mark.with_name(f".{mark.name.lstrip('.')}.{os.getpid()}.tmp")
        os.rename(mark, aside)
        if aside.read_text(encoding="utf-8") != holder:  # somebody removed it in between, and this one is new
            os.link(aside, mark)
        aside.unlink()
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    return not mark.exists()


def _gone(holder: str, mark: Path) -> bool:
    """Whether the process that ``mark`` names is of this machine and not there any more."""
    number, _, machine = holder.partition(" ")
    if os.name != "posix" or machine != socket.gethostname() or not number.isdigit():
        return False
    if int(number) == os.getpid():  # in a container each process may have the number of the one before
        return str(mark) not in _held
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
