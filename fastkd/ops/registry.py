"""How an operator of fastkd is declared: its schema, its fake, its autograd rule for traced graphs.

The schemas live in Python, so they exist without a compiled library; the compiled libraries only implement them. In eager mode the
operations call a thin ``autograd.Function`` instead of the rule registered here, at a fraction of the host cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("fastkd", "DEF")


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare ``fastkd::<schema>`` with the function that gives its outputs' shapes, dtypes, devices and strides."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("fastkd::" + schema.partition("(")[0], fake, lib=_LIBRARY)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd("fastkd::" + name, backward, setup_context=setup_context, lib=_LIBRARY)


def differentiable_once(name: str, public: str) -> None:
    """Make a second derivative through the backward operator ``name`` an error; PyTorch's own default is a silent zero."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{public} has no second derivative: use fastkd.reference.{public}, which is differentiable twice")

    autograd(name, refuse, lambda ctx, inputs, output: None)


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """Run an operator inside an ``autograd.Function``: straight to its kernel, unless a graph of the backward pass is wanted."""
    return operator(*args) if torch.is_grad_enabled() else call_kernel(operator, *args)


def call_kernel(operator: Callable[..., Any], *args: Any) -> Any:
    """Run an operator for which autograd has nothing to record, past its rule, which would be entered only to find that out."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd has anything to do with a call over these tensors. If not, an ``autograd.Function`` would cost 3 µs for nothing."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return forward_ad._current_level >= 0  # forward mode: the Function refuses it, the operator would drop the tangents


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a call over these tensors accumulates and answers."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def smaller(a: Sequence[int], b: Sequence[int]) -> list[int | torch.SymInt]:
    return [torch.sym_min(i, j) for i, j in zip(a, b, strict=True)]


def one_device(tensors: Sequence[Tensor]) -> None:
    """Refuse, in a fake, what the kernels refuse: a mix with ``meta`` tensors would otherwise pass for a traced call."""
    if len({x.device for x in tensors}) > 1:
        raise RuntimeError("tensors of one call lie on different devices")
