"""Files are short, and so are the lines of documents; ruff and clang-format see to those of code."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastkd", "csrc", "tests", "benchmarks")
ENDINGS = {".py", ".cpp", ".cu", ".cuh", ".h", ".inl"}
LIMITS = {"setup.py": 150, "README.md": 150, "CONTRIBUTING.md": 120}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_of_code_is_longer_than_300_lines() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    assert len(files) > 400
    long = {path.relative_to(ROOT).as_posix(): lines_of(path) for path in files if lines_of(path) > 300}
    assert not long


@pytest.mark.parametrize("name", LIMITS)
def test_what_everybody_reads_first_is_short(name: str) -> None:
    assert lines_of(ROOT / name) <= LIMITS[name]
