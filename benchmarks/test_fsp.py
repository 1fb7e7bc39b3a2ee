"""The FSP loss: eager (product and broadcast form), compiled and fused, on the stages of five networks."""

from __future__ import annotations

from typing import Any

import pytest
from speed.cases import grid
from speed.gpu import GPUGroup
from speed.gpu import cases as gpu_cases
from speed.plugin import session_of
from speed.rows import LossGroup
from speed.session import REPLAY, Group, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    cases = grid("fsp", session.full)
    groups: list[Group] = [LossGroup(case, session.full) for case in cases]
    groups += [GPUGroup(case, session.full) for case in gpu_cases("fsp", session.full)]
    metafunc.parametrize("row", session.add(groups))


@pytest.mark.benchmark(timer=REPLAY)
def test_fsp(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
