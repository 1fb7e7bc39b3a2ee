"""Measuring: rounds of several rows interleaved, and the peak of allocated memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from speed import quiet

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"process": time.process_time, "wall": time.perf_counter}

TURN_SECONDS = 0.004  # of timed calls in a turn, so that reading the clock is lost in it
LONG_SECONDS = 0.1  # a call this long needs no untimed one before it
ROUNDS = (5, 25)


@dataclass
class Row:
    """One thing that is timed. ``turn``, if set, times it: in another process, or by a GPU's clock."""

    name: str
    run: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    tolerance: float | None = None  # of the result's relative error; None: there is no result to check
    turn: Callable[[int, bool, str], float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None
    guess: float | None = None  # seconds a call in wall time, where its check has found them
    seconds: list[float] = field(default_factory=list)

    def take_turn(self, calls: int, warm: bool, clock: str) -> float:
        """Seconds a call, over so many calls, after an untimed one if ``warm``."""
        if self.turn:
            return self.turn(calls, warm, clock)
        with self.context():
            return timed(self.run, calls, warm, CLOCKS[clock])


def both_passes(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Tensor]:
    """``loss`` and its backward pass, whose gradients are in ``leaves`` then."""

    def both() -> Tensor:
        for x in leaves:
            x.grad = None
        value = loss()
        value.backward()
        return value

    return both


def timed(run: Callable[[], Any], calls: int, warm: bool, clock: Clock) -> float:
    """Seconds a call. The untimed call brings back what the row before drove out of the caches."""
    if warm:
        run()
    begun = clock()
    for _ in range(calls):
        run()
    return (clock() - begun) / calls


@contextmanager
def threads(count: int) -> Any:
    """PyTorch's threads inside, and no garbage collector."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(count)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def interleave(
    rows: list[Row],
    clock: str,
    budget: float,
    bounds: tuple[int, int] = ROUNDS,
    waits: list[float] | None = None,
) -> list[float]:
    """Fill ``seconds`` of every row: round after round, each row takes its turn, the first one moving on by
    one from round to round.

    ``budget`` in seconds decides the number of rounds, within ``bounds``. A row that raises is left out with
    the reason in ``failed``. Returns how long this thread waited for a processor, once a round
    (``quiet.waiting``): in ``waits`` where that is given, of rounds that were interrupted too.
    """
    waits = [] if waits is None else waits
    plan: dict[str, tuple[int, bool]] = {}
    cost = 0.0
    for row in rows:
        try:
            guess = row.guess
            if guess is None or guess < LONG_SECONDS:
                row.take_turn(1, False, clock)
                guess = row.take_turn(1, False, "wall")
            if guess < LONG_SECONDS:
                guess = min(guess, row.take_turn(1, False, "wall"))
        except Exception as error:
            row.failed = f"{type(error).__name__}: {error}"
            continue
        calls = max(1, min(500, round(TURN_SECONDS / max(guess, 1e-7))))
        plan[row.name] = calls, guess < LONG_SECONDS
        cost += (calls + (guess < LONG_SECONDS)) * guess
    running = [row for row in rows if row.name in plan]
    least, most = bounds
    rounds = int(max(least, min(most, budget / max(cost, 1e-9)))) | 1
    begun = time.perf_counter()
    for number in range(rounds):
        if number >= least and time.perf_counter() - begun > 2 * budget:
            break  # something else keeps the machine busy
        waits.append(quiet.waiting())
        first = number % max(len(running), 1)
        for row in running[first:] + running[:first]:
            row.seconds.append(row.take_turn(*plan[row.name], clock))
    return waits


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's allocator held at once beyond what it held before, while ``run`` ran.

    Memory that a kernel takes elsewhere is not seen: the C++ backend has one scratch buffer a thread.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    results = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
