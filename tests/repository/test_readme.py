"""The documents: their examples run as they stand, and what they name exists."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
EXAMPLES = [
    pytest.param(code, id=f"{name}-{i}")
    for name, text in TEXTS.items()
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "example", "exec"), names)
    if "loss" in names:
        assert all(x.grad is not None and x.grad.isfinite().all() for x in names["student"])  # type: ignore[attr-defined]


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150 and len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 120


def test_the_flags_they_name_exist() -> None:
    known = set(runpy.run_path(str(ROOT / "train.py"))["build_parser"]()._option_string_actions)
    named = set(re.findall(r"`(--[a-z-]+)", TEXTS["docs/training.md"] + TEXTS["docs/recipes.md"]))
    named |= {
        flag
        for text in TEXTS.values()
        for line in re.findall(r"(?<!/)train\.py (.*)", text)  # not tools/train.py of another project
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert named and named <= known | {"--nproc-per-node"}


def test_the_table_of_methods_is_whole() -> None:
    from fastkd import methods

    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", TEXTS["docs/methods.md"], re.MULTILINE))
    assert tuple(rows) == methods.METHODS
    for name in methods.METHODS[1:]:
        kind = methods._KINDS[name]
        if name not in ("kd", "at", "fsp"):  # whose presets stand in docs/losses.md
            presets = re.findall(r"`(\w+)`", rows[name].split("|")[1])
            assert presets == list(kind.presets), name
        options = {field.name for field in dataclasses.fields(kind.Options)}
        assert set(re.findall(r"`(\w+)`", rows[name].split("|")[2])) <= options, name


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} names {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                f"{name} names {target}"
            )


@pytest.mark.parametrize("name", TEXTS)
def test_tests_and_files_that_they_name_exist(name: str) -> None:
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    missing = [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in sources]
    places = ("fastkd", "csrc", "tests", "benchmarks", ".ci")
    paths = [path for path in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", text) if path.split("/")[0] in places]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"{name} names {missing}"
