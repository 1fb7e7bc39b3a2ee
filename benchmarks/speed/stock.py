"""Eager as a user's process runs it, with malloc as it comes.

glibc's malloc gives large blocks back to the system and takes new ones in every step, and the page faults
may double eager's time. The thresholds that prevent it hold for a whole process. So the main process
raises them, and the one that this module starts does not.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
GIB = 1 << 30


def raise_malloc_thresholds() -> bool:
    """Make this process keep the memory it frees. False where malloc is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, GIB) and mallopt(M_TRIM_THRESHOLD, GIB))


class Stock:
    """The other process, started when it is first asked for something. It answers one turn at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def turns(self, work: Any) -> Callable[[int, bool, str], float]:
        """A row's ``turn``: the eager loss of a ``Case``, or a ``Steps``, in the other process, by as many
        threads as PyTorch has here.
        """
        import torch

        def turn(calls: int, warm: bool, clock: str) -> float:
            return self._ask((type(work).__name__, asdict(work), torch.get_num_threads(), calls, warm, clock))

        return turn

    def _ask(self, order: tuple[Any, ...]) -> float:
        if self._process is None:
            here = str(Path(__file__).parent.parent)
            path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "speed.stock"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
        assert self._process.stdin and self._process.stdout
        try:
            pickle.dump(order, self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(
                f"the process of the stock allocator ended with status {self._process.wait()}"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def main() -> None:
    """Serve turns from standard input until it ends."""
    import torch

    from speed.cases import Case, features
    from speed.formulas import FORMULAS, call
    from speed.loops import Steps
    from speed.measure import CLOCKS, timed

    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    inputs, tensors = None, None
    while True:
        try:
            kind, fields, threads, calls, warm, clock = pickle.load(orders)
        except EOFError:
            return
        try:
            torch.set_num_threads(threads)
            if kind == "Steps":
                pickle.dump(Steps(**fields).turn(calls), answers)
                answers.flush()
                continue
            case = Case(**fields)
            if case.inputs != inputs:
                tensors = None
                inputs, tensors = case.inputs, features(case)
            assert tensors
            answer: Any = timed(call(FORMULAS[case.operation], case, *tensors), calls, warm, CLOCKS[clock])
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
