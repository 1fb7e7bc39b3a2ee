"""A part of benchmarks/gpu.py while it runs, in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from speed.gpu_plan import Part


@dataclass
class Running:
    """A part that was started, ``begun`` seconds after the command; ``interrupted``: when it is killed;
    ``stopped``: why it did not end by itself.
    """

    part: Part
    process: subprocess.Popen[bytes]
    output: Path
    begun: float
    seconds: float
    interrupted: float | None = None
    stopped: str | None = None

    @property
    def waited_for(self) -> bool:
        """Whether it has a limit; what has none is stopped before anything is measured."""
        return self.seconds < float("inf")

    def interrupt(self, why: str) -> None:
        if self.stopped is None and self.process.poll() is None:
            self.stopped = why
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """With all that it started, which may have outlived it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
