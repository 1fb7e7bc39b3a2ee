"""The backend's name that is in force: in a thread and async task, in autograd's own threads, in graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fastkd._private import hand_over, handed_over

DEFAULT = os.environ.get("FASTKD_BACKEND") or "auto"

Inside = tuple[tuple[str, int], ...]
"""What has been entered and not left, in order: a name and its thread each."""

_KEY = "fastkd_backend"
_chosen: ContextVar[str | None] = ContextVar(_KEY, default=None)
_inside: Inside = ()
_lock = threading.Lock()

traced: str = DEFAULT
"""What a graph takes that is traced now. It cannot guard on a context variable, but it can on a global: this
one follows what was entered last, in whatever thread, and has not been left.
"""


def here() -> str:
    """The name in force in this thread and async task.

    The backward pass of a GPU runs in a thread of autograd's own, which no context variable reaches. So does
    what checkpointing runs again there: it takes what was in force where the backward pass was begun.
    """
    name = _chosen.get()
    if name is None and _inside:
        thread = threading.get_ident()  # what was entered in this one, another async task has entered
        others = [other for other, entered_in in handed_over(_KEY) if entered_in != thread]
        name = others[-1] if others else None
    return name or DEFAULT


@contextmanager
def put_in_force(name: str) -> Iterator[None]:
    """What ``use_backend`` does with a name that it knows."""
    token = _chosen.set(name)  # first: what torch.compile does not trace, it leaves alone from there on
    entered = name, threading.get_ident()
    _tell(entered, True)
    try:
        yield
    finally:
        _tell(entered, False)
        _chosen.reset(token)


def _tell(one: tuple[str, int], entered: bool) -> None:
    """Tells graphs, and the backward passes that are begun in this thread, of ``one`` entered or left."""
    global _inside, traced
    with _lock:
        _inside = _changed(_inside, one, entered)
        traced = _inside[-1][0] if _inside else DEFAULT
    hand_over(_KEY, _changed(handed_over(_KEY), one, entered))


def _changed(inside: Inside, one: tuple[str, int], entered: bool) -> Inside:
    # threads and async tasks may leave in any order
    return (*inside, one) if entered else tuple(x for x in inside if x is not one)
