"""The name of the backend in force: in a thread and async task, in autograd's own threads, in graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastkd._private import hand_over, handed_over

DEFAULT = os.environ.get("FASTKD_BACKEND") or "auto"

Inside = tuple[tuple[str, int], ...]
"""The ``use_backend`` blocks that were entered and not yet left, in that order: (name, thread) each."""

_KEY = "fastkd_backend"
_chosen: ContextVar[str | None] = ContextVar(_KEY, default=None)
_inside: Inside = ()
_lock = threading.Lock()

traced: str = DEFAULT
"""The name for a graph that is traced now. Graphs cannot guard on a context variable, but they can on a
global: this one holds the name that was entered last, in any thread, of those not yet left.
"""


def here() -> str:
    """The name in force in this thread and async task.

    The backward pass of GPU tensors runs in a thread of autograd's own, where the context variable is not
    set, and so does a forward pass that checkpointing repeats. Both take the name that was in force where the
    backward pass was started.
    """
    name = _chosen.get()
    if name is None and _inside:
        thread = threading.get_ident()  # what was entered in this thread belongs to another async task
        others = [other for other, entered_in in handed_over(_KEY) if entered_in != thread]
        name = others[-1] if others else None
    return name or DEFAULT


@contextmanager
def put_in_force(name: str) -> Iterator[None]:
    """What ``use_backend`` does once the name is checked."""
    token = _chosen.set(name)  # first: torch.compile cannot trace it, and leaves all that follows to Python
    entered = name, threading.get_ident()
    _tell(entered, True)
    try:
        yield
    finally:
        _tell(entered, False)
        _chosen.reset(token)


def _tell(one: tuple[str, int], entered: bool) -> None:
    """Notes for graphs, and for backward passes started in this thread, that ``one`` was entered or left."""
    global _inside, traced
    with _lock:
        _inside = _changed(_inside, one, entered)
        traced = _inside[-1][0] if _inside else DEFAULT
    hand_over(_KEY, _changed(handed_over(_KEY), one, entered))


def _changed(inside: Inside, one: tuple[str, int], entered: bool) -> Inside:
    # threads and async tasks may leave in any order
    return (*inside, one) if entered else tuple(x for x in inside if x is not one)
