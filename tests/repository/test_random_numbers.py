"""Random numbers are torch's: Python's, drawn inside a compiled step, are garbage or never change."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def drawn_elsewhere(text: str) -> list[str]:
    """Imports of random, and names such as np.random, in a file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in ("random", "numpy.random")]
        elif isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
            found.append(ast.unparse(node))
    return found


def test_nothing_draws_by_pythons_random_or_numpys():
    files = [*(ROOT / "fastkd").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "train.py"]
    assert len(files) > 100
    for file in files:
        assert not drawn_elsewhere(file.read_text(encoding="utf-8")), file
    for text in ("import random", "from random import uniform", "import numpy as np\nnp.random.rand(3)"):
        assert drawn_elsewhere(text)


def test_the_guide_for_methods_says_so():
    guide = " ".join((ROOT / "docs" / "adding.md").read_text(encoding="utf-8").split())
    assert "drawn by torch: Python's `random.uniform` gives garbage inside a compiled step" in guide
