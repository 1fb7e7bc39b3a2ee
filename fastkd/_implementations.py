"""The backends as objects: how each runs an operator, and what stands for it in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd import kernels
from fastkd._private import BelowAutograd, dispatch_watched, operator_call


def refuse_second_derivative(operator: str) -> NoReturn:
    public = operator.removesuffix("_backward")
    raise RuntimeError(
        f"{public} has no second derivative: use fastkd.reference.{public}, which is differentiable twice"
    )


class _Operators(dict[str, Callable[..., Any]]):
    """The operators of a namespace by name; each is looked up once."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def __missing__(self, name: str) -> Callable[..., Any]:
        operator = getattr(getattr(torch.ops, self.namespace), name).default
        self[name] = operator_call(operator)
        return self[name]


class Backend:
    """A backend: its name, and how it runs operators, by default through PyTorch's dispatcher."""

    prefetches = False
    """Whether the forward pass of a loss may make the gradients that the backward pass is expected to ask
    for.
    """

    def __init__(self, name: str, namespace: str = "fastkd") -> None:
        self.name = name
        self._namespace = namespace
        self._operators = _Operators(namespace)

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    def graph_op(self, operator: str) -> Any:
        """The operator that stands in a compiled graph."""
        return getattr(getattr(torch.ops, self._namespace), operator).default

    def run(self, operator: str, *args: Any) -> Any:
        """Run an operator below autograd, where that has nothing to record."""
        with BelowAutograd():
            return self._operators[operator](*args)

    def run_backward(self, operator: str, *args: Any) -> Any:
        """Run a backward operator: through autograd, which refuses its derivative, if a graph is recorded."""
        if torch.is_grad_enabled():
            return self._operators[operator](*args)
        with BelowAutograd():
            return self._operators[operator](*args)


class CppBackend(Backend):
    # on a GPU the host must not wait for the value of the gradient, and features do not stay in a cache
    prefetches = True


class TritonBackend(Backend):
    """Eager calls go straight to a launcher, past the dispatcher and its host cost."""

    def run(self, operator: str, *args: Any) -> Any:
        if dispatch_watched() and not kernels.interpreting():
            return super().run(operator, *args)
        return _run_launcher(operator, args)

    def run_backward(self, operator: str, *args: Any) -> Any:
        if dispatch_watched() and not kernels.interpreting():
            return super().run_backward(operator, *args)
        if torch.is_grad_enabled():
            tensors = tensors_in(args)
            if any(x.requires_grad for x in tensors):
                return _DifferentiableOnce.apply(operator, args, *tensors)
        return _run_launcher(operator, args)


REFERENCE = Backend("reference")
CPP = CppBackend("cpp")
TRITON = TritonBackend("triton")
CUDA = Backend("cuda", "fastkd_cuda")
BACKENDS = {backend.name: backend for backend in (REFERENCE, CPP, TRITON, CUDA)}
# in a graph the dispatcher takes the CPU's `fastkd` operator or Triton's, by the device of the tensors
IN_GRAPH = {"fastkd": Backend("graph"), "fastkd_cuda": CUDA}


def tensors_in(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among the arguments, those in lists and tuples in their place."""
    items = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    return [x for x in items if isinstance(x, Tensor)]


def _run_launcher(operator: str, args: tuple) -> Any:
    """Run an operator by its Triton launcher; resolve negative views, as the dispatcher would."""
    try:
        return kernels.launcher(operator)(*args)
    except kernels.NegativeView:
        return kernels.launcher(operator)(*[_without_negative_views(arg) for arg in args])


def _without_negative_views(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_without_negative_views(x) for x in arg]
    return arg.resolve_neg() if isinstance(arg, Tensor) else arg


class _DifferentiableOnce(torch.autograd.Function):
    """``apply(operator, args, *tensors)``: a backward operator run by its launcher, without derivatives.

    ``tensors`` are those within ``args``, given again since autograd does not look into tuples.
    """

    @staticmethod
    def forward(ctx: Any, operator: str, args: tuple, *tensors: Tensor) -> Any:
        ctx.operator = operator
        out = _run_launcher(operator, args)
        return out if isinstance(out, Tensor) else tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivative(ctx.operator)
