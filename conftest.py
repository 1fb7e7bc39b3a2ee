"""Plugins for every pytest run in this tree; those for the tests alone are in `tests/conftest.py`."""

pytest_plugins = ["speed.plugin"]
