"""A whole training step with attention transfer, eager and compiled, by formula and by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speed.gpu_step import RESNET20, RESNET50, GPUStepGroup
from speed.plugin import session_of
from speed.session import REPLAY, Group, Session
from speed.step import TOLERANCE, StepGroup


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = session_of(metafunc.config)
    groups: list[Group] = [StepGroup(precision, session.full) for precision in TOLERANCE]
    if torch.cuda.is_available() or not session.full:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        groups += [GPUStepGroup(model, device, session.full) for model in (RESNET50, RESNET20)]
    metafunc.parametrize("row", session.add(groups))


@pytest.mark.benchmark(timer=REPLAY)
def test_step(benchmark: Any, speed: Session, row: str) -> None:
    speed.bench(benchmark, row)
