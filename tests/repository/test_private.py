"""A PyTorch without a private name that fastkd needs is refused in one sentence."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import _private

TOP = Path(fastkd.__file__).parent


def test_a_name_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(torch._C._functorch, "is_legacy_batchedtensor")
    with pytest.raises(ImportError) as caught:
        importlib.reload(_private)
    message = str(caught.value)
    assert (
        "torch._C._functorch.is_legacy_batchedtensor" in message
        and torch.__version__ in message
        and "\n" not in message
    )
    monkeypatch.undo()
    importlib.reload(_private)


def test_no_other_module_of_the_kernels_reaches_for_private_names():
    """torch._C, torch._dynamo, forward_ad._current_level and the like: a leading underscore after `torch.`,
    or in an import of it.
    """
    private = re.compile(r"\b(?:torch|forward_ad|proxy_tensor|triton)(?:\.\w+)*\._(?!assert\b|_version__)\w+")
    found = []
    for folder in (TOP, TOP / "ops", TOP / "kernels"):
        for file in folder.glob("*.py"):
            if file.name != "_private.py":
                code = ast.unparse(ast.parse(file.read_text()))  # without comments
                found += [f"{file.name}: {name}" for name in private.findall(code)]
    assert not found
