"""Hints for compilers within the formulas.

Floor 0: used by the reference, whose formulas become part of compiled graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._private import exporting

# An operator that does nothing, which a compiler cannot know: it does not recompute what comes before the
# operator to get what comes after it. It is declared to write to x, so that no copy is made.
_LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
if not hasattr(torch.ops.fastkd, "recompute_barrier_"):  # a notebook may import fastkd again
    # the default argument keeps the library alive, which unregisters its operators when it is deleted
    _LIBRARY.define("recompute_barrier_(Tensor(a!) x) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl("recompute_barrier_", lambda x, library=_LIBRARY: None, "CompositeExplicitAutograd")
    torch.library.register_fake("fastkd::recompute_barrier_", lambda x: None, lib=_LIBRARY)
    torch.library.register_vmap("fastkd::recompute_barrier_", lambda *args: (None, None), lib=_LIBRARY)


def save_constants(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a`` and ``b``, which a loss compares; a compiled graph saves the one without a gradient as it is.

    Otherwise a compiler may save an input of the graph instead and recompute the tensor from it in the
    backward pass. Autograd refuses to save inputs that were made under ``torch.inference_mode``, as a
    teacher's features may be, and a graph cannot check for that.
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
