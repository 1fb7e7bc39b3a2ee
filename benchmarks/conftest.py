"""The option ``--benchmark`` for a run of benchmarks alone, and Triton's interpreter as the tests mend it."""

from __future__ import annotations

import importlib

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("speed.plugin")


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> None:
    from fastkd import backends, kernels

    if kernels.interpreting() and backends.availability()["triton"][0]:
        importlib.import_module("interpreter").mend()  # of the tests; needs numpy
