"""Files are short, and so are the lines of documents; ruff and clang-format see to those of code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastkd", "csrc", "tests", "benchmarks")
ENDINGS = {".py", ".cpp", ".cu", ".cuh", ".h", ".inl"}
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "findings").rglob("*.md")])
LIMITS = {"setup.py": 150, "README.md": 150, "CONTRIBUTING.md": 120}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_of_code_is_longer_than_300_lines() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    assert len(files) > 400
    long = {path.relative_to(ROOT).as_posix(): lines_of(path) for path in files if lines_of(path) > 300}
    assert not long


def long_lines(text: str, limit: int) -> list[str]:
    """The lines that are longer, of prose: no table, no example, nothing that a command writes, and no line
    of one link alone.
    """
    text = re.sub(r"^<!-- (\w+):begin -->$.*?^<!-- \1:end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if len(line) > limit and not line.startswith("|")]
    return [line for line in lines if not re.fullmatch(r"\S*\]\(\S+\)\S*", line.strip())]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_of_documents_have_at_most_120_columns(path: Path) -> None:
    assert not long_lines(path.read_text(encoding="utf-8"), 120)


def test_a_long_line_of_prose_is_found() -> None:
    found = "| a table |\nprose of one line\n```\nan example of code\n```\n"
    found += "<!-- a:begin -->\nwritten by a command\n<!-- a:end -->\n"
    assert long_lines(found, 10) == ["prose of one line"]
    assert long_lines("[a](https://long)", 10) == [] != long_lines("see [a](https://long)", 10)


@pytest.mark.parametrize("name", LIMITS)
def test_what_everybody_reads_first_is_short(name: str) -> None:
    assert lines_of(ROOT / name) <= LIMITS[name]
