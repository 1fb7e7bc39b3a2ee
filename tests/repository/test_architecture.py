"""The floors of docs/architecture.md: imports go down, never up, so no two rooms import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = ("fastkd/__init__.py", "fastkd/__main__.py")  # which may import all
FLOORS = {
    place.rstrip("/"): int(number)
    for number, places in re.findall(
        r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE
    )
    for place in re.findall(r"`([^`]+)`", places)
}


def imported(text: str) -> Iterator[str]:
    """The modules and names of fastkd that a file imports, wherever in it: "fastkd.io.files.write"."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastkd":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastkd")


def file_of(name: str) -> str:
    """The file, or the folder, of an imported name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        if (ROOT / f"{path}.py").is_file():
            return f"{path}.py"
        if (ROOT / path).is_dir():
            return path
    raise AssertionError(name)


def floor(path: str) -> int:
    place = next((str(part) for part in (Path(path), *Path(path).parents) if str(part) in FLOORS), None)
    assert place is not None, f"docs/architecture.md has no floor for {path}"
    return FLOORS[place]


def test_no_file_imports_from_a_floor_above_its_own():
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkd").rglob("*.py")]
    checked = 0
    for path in sorted(set(files) - set(ENTRIES)):
        for name in imported((ROOT / path).read_text(encoding="utf-8")):
            other = file_of(name)
            if other != "fastkd":  # the package itself: its version, its errors
                assert floor(other) <= floor(path), f"{path} imports {name}"
                checked += 1
    assert checked > 200
