"""What PyTorch's ``FlopCounterMode`` counts for the operators: the matrix products that the reference makes.

Attention maps, their losses, the taps and batch norms have none, and PyTorch counts no elementwise operations
or sums.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from fastkd._bits import FSP

Shape = Sequence[int]


def _product(a: Shape, b: Shape) -> int:
    """A B^T for each sample, over the positions that are left after pooling."""
    return 2 * a[0] * a[1] * b[1] * math.prod(map(min, a[2:], b[2:]))


def _gradients(chain: Sequence[Shape], stages: Collection[int]) -> int:
    """One product a pair that a stage is in."""
    return sum(
        _product(*pair) * ((i in stages) + (i + 1 in stages))
        for i, pair in enumerate(itertools.pairwise(chain))
    )


def fsp_matrix(a: Shape, b: Shape, *rest: Any, **out: Any) -> int:
    return _product(a, b)


def fsp_matrix_backward(grad: Shape, a: Shape, b: Shape, options: int, **out: Any) -> int:
    return _product(a, b) * (FSP.value(options, "a_grad") + FSP.value(options, "b_grad"))


def fsp_loss(
    student: Sequence[Shape], teacher: Sequence[Shape], options: int, numbers: Any, **out: Any
) -> int:
    matrices = sum(_product(*pair) for chain in (student, teacher) for pair in itertools.pairwise(chain))
    # where it prepares, the forward pass makes the student's gradients too
    return matrices + _gradients(student, range(len(student)) if FSP.value(options, "prepare") else ())


def fsp_loss_backward(
    grad: Shape,
    features: Sequence[Shape],
    matrix_grads: Any,
    options: int,
    stages: Collection[int],
    *rest: Any,
    **out: Any,
) -> int:
    return _gradients(features, stages)


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for namespace in (torch.ops.fastkd, torch.ops.fastkd_cuda):
        for formula in (fsp_matrix, fsp_matrix_backward, fsp_loss, fsp_loss_backward):
            operator = getattr(namespace, formula.__name__)
            if operator not in flop_registry:
                register_flop_formula(operator)(formula)


class _WhenImported(MetaPathFinder):
    """Calls ``then`` once the module ``name`` has been imported, by whomever."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_go_on(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = execute_and_go_on  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the formulas when PyTorch's counter is imported: not now, since it imports Triton."""
    name = "torch.utils.flop_counter"
    if name in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported(name, _register))
