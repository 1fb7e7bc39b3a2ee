"""A PyTorch without a private name that fastkd needs is refused in one sentence."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
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


def test_an_attribute_that_an_instance_lacks_is_named():
    with pytest.raises(ImportError, match=r"fastkd needs Module\._no_such_hooks, which PyTorch"):
        _private.find(torch.nn.Module(), "_no_such_hooks")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
def test_hooks_of_a_module_are_looked_for_at_import(monkeypatch, kind):
    made = torch.nn.Module.__init__

    def without(self, *args, **kwargs):
        made(self, *args, **kwargs)
        delattr(self, f"_{kind}_hooks")

    monkeypatch.setattr(torch.nn.Module, "__init__", without)
    with pytest.raises(ImportError, match=rf"Module\._{kind}_hooks"):
        importlib.reload(_private)
    monkeypatch.undo()
    importlib.reload(_private)


# of named tuples, of Python's own library, and an operator
OTHERS = {
    "_asdict",
    "_fields",
    "_replace",
    "_getframe",
    "_exit",
    "_ArgumentGroup",
    "_DummyThread",  # a thread that Python has not started
    "_compat_pickle",
    "_to_copy",
}


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a file defines: functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_no_other_module_reaches_for_private_names_of_others():
    """``torch._C``, ``torch._dynamo``, ``module._forward_hooks`` and the like: an attribute or import with a
    leading underscore that no file of fastkd defines.
    """
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in TOP.rglob("*.py")}
    known = (
        OTHERS | {path.stem for path in trees} | {name for tree in trees.values() for name in own_names(tree)}
    )
    found = []
    for path, tree in trees.items():
        if path.name == "_private.py":
            continue
        for node in ast.walk(tree):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            found += [f"{path.relative_to(TOP)}: {name}" for name in private if name not in known]
    assert len(trees) > 100 and not found
