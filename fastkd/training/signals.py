"""SIGTERM, by which queues and torchrun end a process, ends a run as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
    """Inside, the first SIGTERM raises :class:`Terminated`; a queue and torchrun may both send it."""
    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # only that one may ask for signals
    if not ours or threading.current_thread() is not threading.main_thread():
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


def end_late(seconds: float = 5) -> Callable[[], int]:
    """From now on SIGTERM ends this process so many seconds after it came, and Ctrl-C does not end it at all.

    For those of several processes that are not the first: a terminal and torchrun send a signal to all at
    once, and the first one stops in good order only if the others still take part in the step that it is in.
    A thread waits for the signal, since the main thread may be in a collective operation that does not end.
    Returns a function that gives the status to end with: that of the signal, if one came, else 1.
    """
    received: list[int] = []
    if threading.current_thread() is threading.main_thread():
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: received.append(number))
        signal.set_wakeup_fd(theirs.fileno())

        def wait() -> None:
            while ours.recv(1)[0] != signal.SIGTERM:
                pass
            time.sleep(seconds)
            os._exit(Terminated.status)

        # the thread holds both ends, which would be closed without a reference
        thread = threading.Thread(target=wait, daemon=True, name="end late")
        thread.sockets = ours, theirs  # type: ignore[attr-defined]
        thread.start()
    return lambda: 128 + received[0] if received else 1
