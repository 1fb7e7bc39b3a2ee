"""SIGTERM, by which queues and torchrun end a process, ends a run as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be."""

    status = 128 + signal.SIGTERM


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was left consistent.

    The message says how far the run came; ``status`` is the command's.
    """

    def __init__(self, message: str, status: int = 130):
        super().__init__(message)
        self.status = status


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` inside, the first one only: a queue and torchrun may both send it."""
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours or threading.current_thread() is not threading.main_thread():  # only that one may ask for signals
        yield
        return

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_late(seconds: float = 5) -> None:
    """From now on SIGTERM ends this process so many seconds after it came.

    For those that follow the first of several processes: torchrun sends SIGTERM to all at once, and the first one
    stops in good order only if the others still take part in the step that it is in. A thread waits for the signal,
    since the main thread may be in a collective operation that does not end.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.set_wakeup_fd(theirs.fileno())

    def wait() -> None:
        ours.recv(1)
        time.sleep(seconds)
        os._exit(Terminated.status)

    # the thread holds both ends, which would be closed without a reference
    thread = threading.Thread(target=wait, daemon=True, name="end late")
    thread.sockets = ours, theirs  # type: ignore[attr-defined]
    thread.start()
