"""Makes ``--benchmark`` known to pytest in a clone of this project; pyproject.toml names it (``-p``).

An option has to be registered before pytest reads the arguments: too early for a ``conftest.py`` in benchmarks/ when tests/ is what is
asked for, and, when the options of pyproject.toml name a plugin, too early for benchmarks/ to be importable. So this module, which is
importable once the project is installed, waits for that and then loads the plugin proper, benchmarks/speed/plugin.py.
"""

from __future__ import annotations

import pytest


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    if (early_config.rootpath / "benchmarks" / "speed" / "plugin.py").is_file():
        early_config.pluginmanager.import_plugin("speed.plugin")
