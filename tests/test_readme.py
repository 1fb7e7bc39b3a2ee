"""README's examples run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("code", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
def test_example_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    if "loss" in names:
        assert all(x.grad is not None and x.grad.isfinite().all() for x in names["student"])  # type: ignore[attr-defined]


def test_the_flags_it_names_exist() -> None:
    known = set(runpy.run_path(str(ROOT / "train.py"))["build_parser"]()._option_string_actions)
    table = README.split("## Experiments")[1].split("##")[0]
    named = set(re.findall(r"`(--[a-z-]+)`", table)) | set(re.findall(r"train\.py.*?(--[a-z-]+)", table))
    assert named and named <= known
