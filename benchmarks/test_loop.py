"""The training loop of fastkd beside a toolkit's: AT, FSP and KD, ResNet-20 from ResNet-20 and from
ResNet-110, batch 128.
"""

from __future__ import annotations

from typing import Any

import pytest
from speed.loops import TITLES, LoopGroup
from speed.plugin import session_of
from speed.session import REPLAY, Group, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    teachers = ("resnet20", "resnet110") if session.full else ("resnet20",)
    groups: list[Group] = [
        LoopGroup(method, teacher, session.full) for teacher in teachers for method in TITLES
    ]
    metafunc.parametrize("row", session.add(groups))


@pytest.mark.benchmark(timer=REPLAY)
def test_loop(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
