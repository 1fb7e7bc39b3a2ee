"""matplotlib, for figures that go into files and need no screen."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkd.errors import UserError, one_line
from fastkd.io.files import write


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


def wanted(flag: str) -> Any:
    """:func:`figure_class` for what ``flag`` asks for. Raises UserError where matplotlib is not installed."""
    try:
        return figure_class()
    except ImportError:
        raise UserError(f"{flag} takes matplotlib (pip install matplotlib)") from None


def rendered(figure: Any, kind: str) -> bytes:
    """The content of a figure's file of that kind: "png", "svg", ... Raises ValueError for an unknown one."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def save(figure: Any, path: Path, flag: str) -> None:
    """Writes a figure in the form that the name's ending says; without one, PNG. Raises UserError."""
    try:
        content = rendered(figure, path.suffix.lstrip(".") or "png")
    except ValueError as error:
        raise UserError(f"{flag} {path}: {one_line(error)}") from None
    write(path, content)
