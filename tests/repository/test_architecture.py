"""The floors of docs/architecture.md: imports go down, never up, so no two rooms import each other."""

from __future__ import annotations

import ast
import graphlib
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


def room(path: str) -> str:
    """The place in the table of docs/architecture.md that a file belongs to."""
    place = next((str(part) for part in (Path(path), *Path(path).parents) if str(part) in FLOORS), None)
    assert place is not None, f"docs/architecture.md has no floor for {path}"
    return place


def floor(path: str) -> int:
    return FLOORS[room(path)]


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


def test_no_room_reaches_itself_by_way_of_others():
    """Rooms of one floor may import each other, in one direction."""
    rooms: dict[str, set[str]] = {place: set() for place in FLOORS}
    for path in sorted((ROOT / "fastkd").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in ENTRIES:
            continue
        for other in map(file_of, imported(path.read_text(encoding="utf-8"))):
            if other != "fastkd" and room(other) != room(name):
                rooms[room(name)].add(room(other))
    assert sum(map(len, rooms.values())) > 50
    list(graphlib.TopologicalSorter(rooms).static_order())  # raises CycleError, which names them


def headers_of(source: Path) -> set[str]:
    """The files of csrc that a C++ file includes, by way of others too."""
    found: set[str] = set()
    left = [source.relative_to(ROOT / "csrc").as_posix()]
    while left:
        text = (ROOT / "csrc" / left.pop()).read_text(encoding="utf-8")
        new = set(re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)) - found
        found |= new
        left += new
    return found


def test_kernels_include_no_other_operations_headers():
    """An edit of a header then compiles its own operation's kernels again, and no others, which take long."""
    kernels = sorted((ROOT / "csrc" / "cpu").glob("*/kernels.cpp"))
    assert len(kernels) > 5
    for source in [*kernels, ROOT / "csrc" / "cpu" / "dispatch.h"]:
        others = {
            name
            for name in headers_of(source)
            if name.count("/") > 1 and not name.startswith((f"cpu/{source.parent.name}/", "cpu/simd/"))
        }
        assert not others, f"{source.relative_to(ROOT)} includes {', '.join(sorted(others))}"
