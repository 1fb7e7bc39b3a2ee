"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from fastkd.errors import UserError
from fastkd.io.locks import marked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path with its ``~`` expanded, which no shell does behind ``--data=``. Raises TypeError."""
    return Path(os.path.expanduser(path))


def write(path: Path, content: bytes | str) -> None:
    """Writes ``path`` whole or not at all: a temporary file beside it, then a rename. Raises UserError (a
    full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save(path: Path, content: dict[str, Any]) -> None:
    """``torch.save`` of containers and tensors through :func:`write`; it loads with ``weights_only=True``."""
    buffer = io.BytesIO()  # torch.save into a full disk raises anything but OSError
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def make_folder(path: Path) -> None:
    """Makes ``path`` and its parents, and tries whether files can be written there. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror or error}") from None
    probe = path / f".probe.{os.getpid()}"
    write(probe, b"")
    probe.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, waits: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock file ``path`` once it is free, and calls ``waits`` until then. Raises UserError."""
    pause = 0.01
    while True:
        with owned(path) as mine:
            if mine:
                yield
                return
        if waits is not None:
            waits()
        time.sleep(pause)
        pause = min(2 * pause, 1)


@contextmanager
def owned(path: Path) -> Iterator[bool]:
    """Holds the lock file ``path`` if it is free, and gives whether it does. Raises UserError. The lock of a
    process that is killed is released.

    Where the file system has no such locks (Lustre and NFS, as they are mounted), see :func:`marked`.
    """
    with _lock_file(path) as file, _kept_from_children(file):
        reason = "" if fcntl is None else None
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is None:
            yield True
        else:
            with marked(path, reason) as mine:
                yield mine


_held: set[IO[bytes]] = set()


def _close_held() -> None:
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    # a forked process, such as one that reads images, would hold the lock of a killed one until it ends too
    os.register_at_fork(after_in_child=_close_held)


@contextmanager
def _kept_from_children(file: IO[bytes]) -> Iterator[None]:
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


def _lock_file(path: Path) -> IO[bytes]:
    try:
        return open(path, "wb")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def sweep(folder: Path) -> None:
    """Removes half-written files of a process that was killed. The folder's lock must be held."""
    for half in folder.glob(".*.tmp"):
        with suppress(OSError):
            half.unlink()
