"""The attention-transfer loss: eager, compiled and fused, on the stages of five networks."""

from __future__ import annotations

from typing import Any

import pytest
from speed.cases import grid
from speed.plugin import session_of
from speed.rows import LossGroup
from speed.session import REPLAY, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    cases = grid("attention", session.full, tiny=True, upstream=1000)
    metafunc.parametrize("row", session.add([LossGroup(case, session.full) for case in cases]))


@pytest.mark.benchmark(timer=REPLAY)
def test_attention(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
