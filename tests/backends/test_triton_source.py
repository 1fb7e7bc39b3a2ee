"""The source of Triton's kernels: what some release of Triton does not compile."""

from __future__ import annotations

import ast
from pathlib import Path

from fastkd import kernels


def test_no_kernel_function_returns_a_bare_constant():
    """Triton 3.7.0 and 3.7.1 do not compile what is done with it; tests/packaging/triton_releases.py asks
    each release.
    """
    for file in Path(kernels.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "jit" in ast.unparse(by) for by in function.decorator_list
            ):
                constants = {
                    arg.arg
                    for arg in function.args.args
                    if arg.annotation and "constexpr" in ast.unparse(arg.annotation)
                }
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and node.value is not None:
                        names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
                        assert names - constants, (
                            f"{file.name}:{node.lineno} returns {ast.unparse(node.value)}"
                        )
