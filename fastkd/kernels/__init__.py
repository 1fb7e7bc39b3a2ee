"""Triton kernels and their launchers. Triton is imported when the first of them is wanted.

| file | what lives there |
|---|---|
| `common/launch.py` | how a tensor is seen as a matrix, how work is divided, how a kernel is launched |
| `common/keys.py` | what a compiled kernel is called in Triton's cache |
| `common/fields.py` | names of places in the tuples that attention's kernels take |
| `common/tile.py` | what kernels have in common: powers, positions, sums over channels, normalization |
| `common/pool.py` | adaptive pooling of features and channel power sums, and its gradient |
| `common/windows.py` | what pooling and its gradients have in common |
| `attention/loss.py`, `loss_gradient.py`, `loss_kernels.py` | the attention-transfer loss over stages |
| `attention/map.py`, `map_kernels.py` | the attention map; with a ReLU before and a gradient after |
| `attention/tap.py` | the taps: the same kernels with those |
| `crd/loss.py`, `loss_kernels.py` | the CRD loss and its gradients, over drawn rows of two banks |
| `fsp/forward.py`, `forward_kernels.py` | FSP matrices and the FSP loss over a chain, forward |
| `fsp/gradient.py`, `terms.py`, `gradient_kernels.py`, `term_kernels.py` | and backward |
| `fsp/low_rank.py` | what those do where the matrix would be larger than the features |
| `fsp/saved.py` | where that is; without Triton |
| `fsp/tile.py`, `products.py` | features averaged over windows; their products and differences |
| `fsp/fields.py` | names of places in the tuples that FSP's kernels take |
| `fsp/view.py` | how FSP sees a feature, and the tiles of its products |
| `fsp/pool.py` | the gradient of unusual pooling |
| `limits.py` | what the kernels do not serve; without Triton |
| `rkd/loss.py` | the RKD loss and its gradients |
| `rkd/pair_kernels.py`, `triple_kernels.py`, `gradient_kernels.py` | its three launches |
| `rkd/sum_kernels.py` | one between two of these, of large batches |

A launcher has the name and the arguments of the operator that it implements (``torch.ops.fastkd``).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from fastkd._private import constant_in_graphs

LAUNCHERS = {
    "attention_map": "attention.map",
    "attention_map_backward": "attention.map",
    "attention_transfer_loss": "attention.loss",
    "attention_transfer_loss_backward": "attention.loss_gradient",
    "crd_pass": "crd.loss",
    "fsp_matrix": "fsp.forward",
    "fsp_matrix_backward": "fsp.gradient",
    "fsp_loss": "fsp.forward",
    "fsp_loss_backward": "fsp.gradient",
    "rkd_pass": "rkd.loss",
    "tap_backward": "attention.tap",
    "relu_tap": "attention.tap",
    "relu_tap_backward": "attention.tap",
}
"""The operators that Triton serves, and the file of each one's launcher."""


class NegativeView(Exception):
    """A kernel was to read a view such as ``z.conj().imag``, whose numbers have the other sign in memory."""


@functools.cache
def launcher(operator: str) -> Callable[..., Any]:
    """The function that runs ``fastkd::<operator>``; imports Triton."""
    return getattr(importlib.import_module(f"fastkd.kernels.{LAUNCHERS[operator]}"), operator)


@constant_in_graphs
def own_precision() -> str:
    """What ``precision=None`` means: PyTorch's setting for float32 products on a GPU, "tf32" or "ieee".

    A graph holds the setting as it was when the graph was traced.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Found out once, and stored in globals: a graph that is traced reads those, where it could not ask.
_interpreting: bool | None = None
_state: tuple[bool, str] | None = None


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors, for tests; asked once, since Triton asks when a
    kernel is imported.
    """
    global _interpreting
    if _interpreting is None:
        _interpreting = (
            os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
            and triton_version() is not None
        )
    return _interpreting


def state() -> tuple[bool, str]:
    """Whether the kernels can run here, and why or why not. Does not import Triton, which takes long."""
    global _state
    if _state is None:
        _state = _find_out()
    return _state


def triton_version() -> str | None:
    """Triton's version, "unknown" if nothing tells it, None if there is no Triton. It is not imported: that
    takes long, and no kernel may be wanted.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _find_out() -> tuple[bool, str]:
    version = triton_version()
    if version is None:
        return (
            False,
            (
                "triton is not installed: PyTorch's CUDA wheels for Linux bring it, `pip install triton`"
                " does too"
            ),
        )
    triton = f"triton {version}" if version != "unknown" else "triton of unknown version"
    if interpreting():
        return True, f"{triton}, interpreted on CPU tensors (TRITON_INTERPRET): for tests, slow"
    if not torch.cuda.is_available():
        return (
            False,
            (
                f"{triton} is installed, but PyTorch sees no CUDA device (TRITON_INTERPRET=1 runs it"
                " on CPUs, slowly)"
            ),
        )
    return True, f"{triton}, {torch.cuda.get_device_name()}"
