"""What Triton's kernels do not serve of a call that lies where they run. Without Triton: `auto` asks this."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastkd.kernels import LAUNCHERS

LARGEST = 2**30
"""Positions, channels or rows: kernels count in int32, and beyond the end of what they count."""
WIDEST = 2**14
"""Numbers of CRD's embeddings: a tile has at least one whole row, 32 numbers a thread of 512."""
MOST_SAMPLES = 46336
"""Of RKD: places in a matrix over the pairs of samples are 32 bits."""
NO_KERNEL = "it has no kernel of this operation"


def why_not(
    operation: str, arguments: tuple[object, ...], tensors: Iterable[Tensor], options: tuple[object, ...]
) -> str:
    """Why they do not serve ``operation`` over ``arguments``, whose tensors are ``tensors``, or "".

    ``options`` of "crd_pass" are (K + 1,). While a graph is traced sizes are left to the launchers, which
    refuse them too: they may be symbols, and a question would fix them.
    """
    if operation not in LAUNCHERS and f"{operation}_backward" not in LAUNCHERS:
        return NO_KERNEL
    sized = not torch.compiler.is_compiling()
    for x in tensors:
        if x.dtype == torch.float64:
            return "its kernels take float16, bfloat16 and float32, not float64"
        if sized and x.numel() > LARGEST and operation in _MAPS:
            most = max(x.shape[1:2].numel(), x.shape[2:].numel())
            if most > LARGEST:
                return f"its kernels take samples of up to {LARGEST} positions and channels, not {most}"
    limits = _LIMITS.get(operation)
    return limits(arguments, options) if limits and sized else ""


def _crd(arguments: tuple, options: tuple) -> str:
    width, drawn = arguments[0].shape[-1], options[0] if options else 0
    if width > WIDEST:
        return f"its kernels take embeddings of up to {WIDEST} numbers, not {width}"
    return f"its kernels take up to {LARGEST} rows an image, not {drawn}" if drawn > LARGEST else ""


def _rkd(arguments: tuple, options: tuple) -> str:
    count = len(arguments[0])
    if count > MOST_SAMPLES:
        return f"its kernels take up to {MOST_SAMPLES} samples, not {count}"
    width = max(math.prod(x.shape[1:]) for x in arguments)
    return f"its kernels take up to {LARGEST} numbers a sample, not {width}" if width > LARGEST else ""


_LIMITS = {"crd_pass": _crd, "rkd_pass": _rkd}
_MAPS = {"attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss", "tap", "relu_tap"}
