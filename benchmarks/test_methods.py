"""The losses of the other methods, ours and as they are published."""

from __future__ import annotations

from typing import Any

import pytest
from speed.methods import groups
from speed.plugin import session_of
from speed.session import REPLAY, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    metafunc.parametrize("row", session.add([*groups(session.full)]))


@pytest.mark.benchmark(timer=REPLAY)
def test_method(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
