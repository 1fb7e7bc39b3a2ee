"""What a run can end with other than a result."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend. The message is the one line they read; the command ends with status 2."""


class Interrupted(Exception):
    """Ctrl-C, after everything was left consistent. The message says how far the run came; the command ends with status 130."""
