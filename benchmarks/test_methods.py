"""The losses and whole steps of the other methods, ours and as they are published."""

from __future__ import annotations

from typing import Any

import pytest
from speed import gpu_methods, method_steps
from speed.methods import groups
from speed.plugin import session_of
from speed.session import REPLAY, Group, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    every: list[Group] = [
        *groups(session.full),
        *method_steps.groups(session.full),
        *gpu_methods.groups(session.full),
    ]
    metafunc.parametrize("row", session.add(every))


@pytest.mark.benchmark(timer=REPLAY)
def test_method(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
