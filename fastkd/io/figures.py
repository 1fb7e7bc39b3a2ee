"""matplotlib, for figures that go into files and need no screen."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any


def figure_class() -> Any:
    """matplotlib's ``Figure``. Raises ImportError where matplotlib is not installed.

    ``MPLBACKEND`` says how pyplot shows figures, a notebook's in the notebook. matplotlib reads it while it
    is imported, and a name that it does not know there ends the import. It is therefore set afterwards, and
    left out where it is unknown.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            sys.modules["matplotlib"].rcParams["backend"] = backend
    return Figure
