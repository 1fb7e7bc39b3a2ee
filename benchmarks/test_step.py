"""A whole training step with attention transfer, eager and compiled, with the formula and with the operators."""

from __future__ import annotations

from typing import Any

import pytest
from speed.plugin import session_of
from speed.session import REPLAY, Session
from speed.step import TOLERANCE, StepGroup


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    metafunc.parametrize("row", session.add([StepGroup(precision, session.full) for precision in TOLERANCE]))


@pytest.mark.benchmark(timer=REPLAY)
def test_step(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
