"""Whether a run had the machine to itself. If not, it judges no goal.

Two signs are recorded with each group. ``waiting``: wall time over processor time of a short loop on one
thread, run once a round; above 1 the thread waited for a processor that others used. ``spread``: the upper
quartile of a row's rounds over the lower one, the median of the group's rows. Caches and memory that others
use show there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

# found on machines that nobody else used: waiting up to 1.01, spread up to 1.1
MOST_WAITING, MOST_SPREAD = 1.05, 1.2
PROBE_SECONDS = 0.002  # of processor time; a system's turns take a few milliseconds


def waiting(
    processor: Callable[[], float] = time.thread_time, wall: Callable[[], float] = time.perf_counter
) -> float:
    """Wall time over processor time of a loop on this thread."""
    begun, first = wall(), processor()
    while (spent := processor() - first) < PROBE_SECONDS:
        pass
    return (wall() - begun) / spent


def spread(rounds: list[list[float]]) -> float:
    """The median, over rows, of the upper quartile of a row's rounds over the lower one."""
    found = [quantiles(seconds, n=4, method="inclusive") for seconds in rounds if len(seconds) > 1]
    return median([high / low for low, _, high in found if low > 0] or [1.0])


def why_not_judged(result: dict[str, Any]) -> str | None:
    """One line that says how busy the machine was; None where it was quiet, or where nothing was recorded."""
    records = [record for record in result["groups"] if "waiting" in record]
    if not records:
        return None
    waited, spreads = (median(record[key] for record in records) for key in ("waiting", "spread"))
    if waited <= MOST_WAITING and spreads <= MOST_SPREAD:
        return None
    return (
        f"THE MACHINE WAS NOT QUIET (wall time {waited:.2f} of processor time, at most {MOST_WAITING}; rounds"
        f" spread {spreads:.2f}, at most {MOST_SPREAD}): ratios of one thread's processor time only, and no"
        " goal is judged"
    )


def trusted(result: dict[str, Any]) -> dict[str, Any]:
    """The run, or of a busy machine what was not measured in wall time: one thread in processor time, and a
    GPU's own time.
    """
    if why_not_judged(result) is None:
        return result
    return {**result, "groups": [record for record in result["groups"] if record["clock"] != "wall"]}
