"""What a run can end with other than a result."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend. The message is the one line they read; the command ends with status 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after everything was left consistent.

    The message says how far the run came; ``status`` is the command's.
    """

    def __init__(self, message: str, status: int = 130):
        super().__init__(message)
        self.status = status
