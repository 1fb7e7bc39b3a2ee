"""``--benchmark``, where benchmarks alone are asked for."""

from __future__ import annotations

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("speed.plugin")
