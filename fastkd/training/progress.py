"""What a run shows while it runs: a bar on a terminal, one line an epoch everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from fastkd.io import console
from fastkd.io.console import say

LOGGED = 120.0
"""Seconds between two lines of a long epoch in a log."""


def clock(seconds: float) -> str:
    """70 -> 1:10, 3700 -> 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Progress:
    """Lines go to stdout; on a terminal stderr shows a bar over the whole run: tqdm's, or without tqdm a line
    every ten seconds. Elsewhere stdout and the log get such a line every two minutes, within long epochs.

    When stderr is not a terminal, or ``bar`` is False, nothing but errors is written to it.
    """

    def __init__(self, title: str, steps: int, done: int = 0, silent: bool = False, bar: bool = True):
        self.title, self.steps, self.done, self.first = title, steps, done, done
        self.shown = self.begun = time.perf_counter()
        self.silent = silent or console.silent()
        seen = bar and not self.silent
        self.terminal, self.bar = seen and sys.stderr is not None and sys.stderr.isatty(), None
        if self.terminal:
            self.bar = _bar(title, steps, done)

    def advance(self, describe: Callable[[], str]) -> None:
        """One step more. ``describe`` is called about once a second only, since it waits for the device."""
        self.done += 1
        now = time.perf_counter()
        pause = 1 if self.bar is not None else 10 if self.terminal else LOGGED
        if self.silent or now - self.shown < pause:
            return
        self.shown = now
        if self.bar is not None:
            self.bar.set_postfix_str(describe(), refresh=False)
            self.bar.update(self.done - self.bar.n)
            return
        text = f"{self.title}: step {self.done} of {self.steps}, {describe()}, {clock(self.left())} left"
        if self.terminal:
            print(text, file=sys.stderr, flush=True)
        else:
            say(text)

    def wait(self, seconds: float) -> None:
        """Leaves out ``seconds`` in which nothing was trained when the pace is calculated."""
        self.begun += seconds

    def left(self) -> float:
        """Seconds to the end at the pace so far."""
        return (time.perf_counter() - self.begun) / max(self.done - self.first, 1) * (self.steps - self.done)

    def line(self, text: str) -> None:
        if self.silent:
            return
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)
            self.bar.clear()
        say(text)
        if self.bar is not None:
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _bar(title: str, steps: int, done: int) -> Any:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return None
    return tqdm(total=steps, initial=done, desc=title, unit="step", leave=False, dynamic_ncols=True)
