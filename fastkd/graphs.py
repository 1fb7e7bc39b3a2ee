"""What the formulas tell a compiler beside themselves.

Floor 0: used by the reference, whose formulas stand in compiled graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# It does nothing, and no compiler knows that: what comes after it cannot be had again from what lies before it. It claims to write to x, so
# that it needs no copy.
if not hasattr(torch.ops.fastkd, "recompute_barrier_"):  # it is there where fastkd is imported a second time in a process
    _LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
    _LIBRARY.define("recompute_barrier_(Tensor(a!) x) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl("recompute_barrier_", lambda x: None, "CompositeExplicitAutograd")
    torch.library.register_fake("fastkd::recompute_barrier_", lambda x: None, lib=_LIBRARY)
    torch.library.register_vmap("fastkd::recompute_barrier_", lambda info, in_dims, x: (None, None), lib=_LIBRARY)


def save_constants(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors that a loss compares, unchanged. In a compiled graph the one without a gradient is saved as it is for the backward pass.

    Left alone, a compiler may save an input of the graph in its place and compute it again from that. Autograd refuses to save an input
    that was made under ``torch.inference_mode``, as a teacher's may be, and a graph cannot ask whether one was.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return a, b
    if a.requires_grad == b.requires_grad:
        return a, b
    return (a, _behind_barrier(b)) if a.requires_grad else (_behind_barrier(a), b)


def _behind_barrier(x: Tensor) -> Tensor:
    x = x.clone()  # it may be an input
    torch.ops.fastkd.recompute_barrier_(x)
    return x
