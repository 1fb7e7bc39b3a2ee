"""A plugin of pytest: what tests, and the processes that they start, leave among the system's temporary files
goes when the run ends.
"""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from pathlib import Path

import pytest

PREFIX = "fastkd-tests-"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    before = tempfile.gettempdir()
    if Path(before).name.startswith(PREFIX):
        return  # the processes of pytest-xdist, and runs that a test starts, have the folder of the whole
    # a short path: sockets of multiprocessing lie below, and their names may have 107 bytes
    folder = tempfile.mkdtemp(prefix=PREFIX)
    compiled = compiled_in(before)
    if os.path.isdir(compiled):  # torch.compile has its compiled headers there, whatever the variable says
        os.symlink(compiled, compiled_in(folder), target_is_directory=True)
    changed = {name: os.environ.get(name) for name in ("TMPDIR", *kept(before))}
    os.environ.update({"TMPDIR": folder, **kept(before)})
    tempfile.tempdir = None  # asks TMPDIR again

    def end() -> None:
        for name, value in changed.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)

    config.add_cleanup(end)


def compiled_in(place: str) -> str:
    """Where torch.compile keeps what it has compiled, unless a variable says otherwise."""
    return os.path.join(place, f"torchinductor_{getpass.getuser()}")


def kept(place: str) -> dict[str, str]:
    """What stays where it would be without this plugin: pytest's folders of the last runs, and what
    torch.compile has compiled, which the next run finds.
    """
    return {
        "PYTEST_DEBUG_TEMPROOT": os.environ.get("PYTEST_DEBUG_TEMPROOT", place),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled_in(place)),
    }
