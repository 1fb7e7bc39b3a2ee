"""As much of pytest-benchmark as the benchmarks use, where it is not installed: rows are measured by
speed/session.py in any case, and pytest-benchmark shows their times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class Benchmark:
    """The fixture ``benchmark``, without a clock."""

    def __init__(self) -> None:
        self.group, self.disabled = "", False
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Callable[[], Any], rounds: int = 1) -> Any:
        """Calls the target once: the times of its rounds are in the results already."""
        return target()


@pytest.fixture
def benchmark() -> Benchmark:
    return Benchmark()
