"""What fastkd tells a user: errors that they can mend, and warnings that point at their own line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

# Frames of these packages lie between a user's line and ours: modules, autograd Functions, wrappers of
# parallel training.
_PASSED = tuple(f"{Path(sys.modules[name].__file__ or '').parent}{os.sep}" for name in ("torch", "fastkd"))

_said: set[str] = set()


class UserError(Exception):
    """Something that the user can mend, told in one line; a command ends with ``status``."""

    status = 2


class TeacherError(UserError):
    """What several runs wait for is not there."""


class PartlyFailedError(UserError):
    """Some runs of a command failed, and the others are finished."""

    status = 1


def warn_once(message: str, key: str | None = None) -> None:
    """Warns with ``message`` once a process, at the innermost line that is neither fastkd's nor PyTorch's.

    Of several messages with one ``key`` only the first is said.
    """
    key = key or message
    if key in _said:
        return
    _said.add(key)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
