"""What the formulas tell a compiler beside themselves.

Floor 0: used by the reference, whose formulas stand in compiled graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._private import exporting

# It does nothing, and no compiler knows that: it will not compute again what lies before it to have what
# comes after. It claims to write to x, so that it needs no copy.
_LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
if not hasattr(torch.ops.fastkd, "recompute_barrier_"):  # a notebook may import fastkd again
    # PyTorch keeps this function, and so the library, which takes back what it registered when it is deleted
    _LIBRARY.define("recompute_barrier_(Tensor(a!) x) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl("recompute_barrier_", lambda x, library=_LIBRARY: None, "CompositeExplicitAutograd")
    torch.library.register_fake("fastkd::recompute_barrier_", lambda x: None, lib=_LIBRARY)
    torch.library.register_vmap("fastkd::recompute_barrier_", lambda *args: (None, None), lib=_LIBRARY)


def save_constants(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors that a loss compares, unchanged; a compiled graph saves one without gradient as it is.

    Left alone, a compiler may save an input of the graph in its place and compute it again in the backward
    pass. Autograd refuses to save an input that was made under ``torch.inference_mode``, as a teacher's may
    be, and a graph cannot ask whether one was.
    """
    if not torch.compiler.is_compiling() or exporting() or not torch.is_grad_enabled():
        return a, b
    if a.requires_grad == b.requires_grad:
        return a, b
    return (a, _behind_barrier(b)) if a.requires_grad else (_behind_barrier(a), b)


def _behind_barrier(x: Tensor) -> Tensor:
    x = x.clone()  # it may be an input
    torch.ops.fastkd.recompute_barrier_(x)
    return x
