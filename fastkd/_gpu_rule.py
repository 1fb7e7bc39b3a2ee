"""How `auto` chooses between the two backends of a GPU, where both serve a call.

- Attention maps, losses and taps: C++. Measured on an H200 (docs/gpu.md): 0.33 ms by the wall clock against
  Triton's 0.49 over ResNet-20's stages at batch 128, as one launch forward where Triton has two. At the
  ResNet-50 stages both take as long. In a CUDA graph, where the host costs nothing, Triton was faster (0.026
  ms against 0.040). The kernels of both have changed since.
- FSP, calculated and not measured yet: C++ while the time of the host dominates. Products of many channels
  are faster by Triton, which uses Hopper's own tensor-core instructions and larger tiles, and saves no matrix
  larger than the features; with the 64 x 64 tiles of the C++ kernels the ResNet-50 stages are read six times.
  So Triton from LARGE_PRODUCTS multiply-adds on, about 20 us of an H200 in tf32.
- FSP of stages that differ in size, which are pooled: Triton until it is measured. The C++ kernels load
  windows of 2, 4, 8 or 16 numbers at once where sizes divide, other windows four numbers at a time.
- float64: C++, since Triton has none.
"""

from __future__ import annotations

from torch import Tensor

from fastkd._implementations import CUDA, TRITON, Backend

LARGE_PRODUCTS = 1 << 32


def faster(operation: str, arguments: tuple[object, ...]) -> Backend:
    """CUDA or TRITON for a call of ``operation`` over ``arguments``, tensors or sequences of them."""
    if not operation.startswith("fsp"):
        return CUDA
    chains = [chain for chain in arguments if isinstance(chain, (list, tuple))] or [arguments]
    pairs = [
        [(a, b) for a, b in zip(c, c[1:]) if isinstance(a, Tensor) and isinstance(b, Tensor)] for c in chains
    ]
    if any(a.shape[2:] != b.shape[2:] for chain in pairs for a, b in chain):
        return TRITON
    work = sum(_products(a, b) for a, b in pairs[0])
    return CUDA if work < LARGE_PRODUCTS else TRITON


def _products(a: Tensor, b: Tensor) -> int:
    if a.dim() < 3 or b.dim() < 3:
        return 0  # misuse, which will be explained
    return a.shape[0] * a.shape[1] * b.shape[1] * min(x.shape[2:].numel() for x in (a, b))
