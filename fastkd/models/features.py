"""What a model shows of its inside, returned by ``forward`` and never hooked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """The maps along one forward pass, with RepDistiller's choice of points.

    ========== ============================================= ===========================================
    field      ResNet                                        wide ResNet
    ========== ============================================= ===========================================
    ``stem``   ReLU(bn1(conv1(x)))                           conv1(x)
    ``stages`` three group outputs, after the ReLU           three group outputs, the raw residual sums
    ``pooled`` (N, C), the vector that the classifier sees   the same, of ReLU(bn1(last sum))
    ``blocks`` every residual block's output, like stages    the same
    ``maps``   three maps of ``stages``, only with ``tap=``  the same
    ========== ============================================= ===========================================

    With ``features="preact"`` ``stages`` and ``blocks`` hold the maps before the ReLU instead: a ResNet's residual sums, a wide
    ResNet's sums after the batch norm that comes next. ``stem`` and ``pooled`` stay as they are.
    """

    stem: Tensor
    stages: tuple[Tensor, ...]
    pooled: Tensor
    blocks: tuple[Tensor, ...]
    maps: tuple[Tensor, ...] = ()


# The name under which torch.export.save writes it; torch.export.load needs fastkd imported. PyTorch has no public
# function for this.
_register = getattr(torch.utils._pytree, "_register_namedtuple", None)
if _register is not None:
    _register(Features, serialized_type_name="fastkd.models.Features")
