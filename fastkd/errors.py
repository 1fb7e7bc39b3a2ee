"""Errors that the user can mend, and warnings that point at the user's own line."""

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
    """The teacher that several runs need cannot be had, so that none of them can go on."""


class PartlyFailedError(UserError):
    """Some runs of a command failed, and the others are finished."""

    status = 1


def one_line(text: object) -> str:
    """An error, or any text, with a space in place of each line's end and of each run of spaces."""
    return " ".join(str(text).split())


def warn_once(message: str, key: str | None = None) -> None:
    """Issues the warning ``message`` once per process, at the innermost line outside of fastkd and PyTorch.

    Of several messages with the same ``key`` only the first is issued.
    """
    key = key or message
    if key in _said:
        return
    _said.add(key)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
