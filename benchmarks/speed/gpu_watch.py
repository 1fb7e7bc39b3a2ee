"""A process that ends the parts of benchmarks/gpu.py when the command is gone, by SIGKILL too."""

from __future__ import annotations

import contextlib
import sys

# by its name: tests count what gpu_run starts, and this is no part
from subprocess import PIPE, Popen, TimeoutExpired

# a line on stdin: a group that was started, and again when it has ended; the end of stdin: the command's
WATCHING = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    groups ^= {int(line)}
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Watch:
    """The process; in a session of its own, so that what ends the command's session leaves it alive."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", "-c", WATCHING]
        self._process = Popen(command, stdin=PIPE, start_new_session=True)

    def tell(self, group: int) -> None:
        """A process group was started, or has ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody has ended it
            self._process.stdin.write(b"%d\n" % group)
            self._process.stdin.flush()

    def close(self) -> None:
        """The command ends by itself, and has ended its parts."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(TimeoutExpired):
            self._process.wait(5)
