"""Methods, models and data sets that others add: by a decorator, a file or an entry point of their package.

Each addition goes into the table of its kind, in ``fastkd.methods``, ``fastkd.models`` or ``fastkd.data``.
This module records where it came from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Collection, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fastkd.errors import UserError, one_line

GROUPS = {"method": "fastkd.methods", "model": "fastkd.models", "dataset": "fastkd.data"}
"""By kind, the group of its entry points."""

IMPORTED = "_fastkd_text"
"""The attribute in which a module of :func:`of_file` keeps :func:`text_of` its file, as imported."""

_origins: dict[tuple[str, str], tuple[str, str]] = {}  # the origin as users see it, and the file
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def register(kind: str, table: MutableMapping[str, Any], name: str, value: Any, package: str = "") -> None:
    """Puts ``value`` into ``table``; ``package``: name and version of the package that provides it, if any.

    A file that is imported again replaces what it added before. Raises ValueError for a name that is not
    allowed or already taken.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{kind} name is {name!r}, wanted small letters, digits, - and _")
    told, file = _origin(value)
    before, earlier = _origins.get((kind, name), ("fastkd itself", ""))
    if name in table and file != earlier:
        raise ValueError(f"{kind} {name!r} is there already, from {before}: wanted another name")
    table[name] = value
    _origins[kind, name] = f"{package}, {told}" if package else told, file


def find(kind: str, table: Collection[str], name: str, add: Callable[[str, Any, str], None]) -> None:
    """Loads the entry point ``name`` of an installed package, if there is one and ``table`` lacks the name.

    The loaded object may register itself while it is imported; else ``add(name, value, package)`` is called.
    Raises ValueError for one that cannot be loaded.
    """
    if name in table:
        return
    for point in importlib.metadata.entry_points(group=GROUPS[kind], name=name):
        package = "" if point.dist is None else f"{point.dist.name} {point.dist.version}"
        try:
            value = point.load()
            if name not in table:
                add(name, value, package)
        except Exception as error:
            raise ValueError(f"{kind} {name!r} of {package} cannot be loaded: {said(error)}") from None
        return


def known(kind: str) -> list[str]:
    """Names of the entry points of a kind, loaded or not."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=GROUPS[kind])})


def load(file: str | Path) -> ModuleType:
    """Imports a file ``my_file.py``, or a module by its name, once; what it registers is there from then on.

    Raises UserError, one line with the place of the error.
    """
    name, path = str(file), Path(file).expanduser()
    if path.suffix != ".py" and not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"plugin {name!r} is no file and no module, wanted my_file.py or a module's name")
    try:
        module = of_file(path.resolve()) if path.suffix == ".py" else importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"plugin {file} cannot be loaded: {said(error)}") from None
    if getattr(module, "__file__", None) is None and name not in sys.builtin_module_names:
        raise UserError(f"plugin {name!r} is a folder, wanted my_file.py or a module's name")
    return module


def origin(kind: str, name: str) -> str | None:
    """Where something was added from: "my_file.py 1a2b3c4d", the file's name and a hash of its text.

    None for what belongs to fastkd.
    """
    return _origins.get((kind, name), (None, ""))[0]


def text_of(path: Path) -> str:
    """The file's name and a hash of its text: "nets.py 1a2b3c4d"."""
    return f"{path.name} {hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()}"


@functools.cache
def of_file(path: Path) -> ModuleType:
    """The file as a module, imported once. It may import files beside it; raises whatever it does."""
    if not path.is_file():
        raise FileNotFoundError("no such file")
    text = text_of(path)
    name = f"fastkd_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    module.__dict__[IMPORTED] = text  # the file may be changed while this process runs
    return module


def _origin(value: Any) -> tuple[str, str]:
    """(name and hash of the file that defines ``value``, as :func:`text_of` gives them; its whole path).

    For an object that no file defines, as in an interactive session, both are the name of its module.
    """
    name = getattr(value, "__module__", type(value).__module__)
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or not Path(file).is_file():
        return name, name
    return text_of(Path(file)), str(file)


def said(error: BaseException) -> str:
    """An error in one line: its type, its message and the line of the user's file that raised it."""
    text = one_line(error)[:200]
    if isinstance(error, (FileNotFoundError, SyntaxError, UserError)):
        return text
    ours = (str(Path(__file__).parent), str(importlib.__file__), "<frozen")
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)
    ]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"
