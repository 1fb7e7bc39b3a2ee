"""What a model shows of its inside, returned by ``forward`` and never hooked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn


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


class Record:
    """What the blocks of one forward pass leave for :class:`Features` beside the tensor that each returns.

    Groups and blocks are called as modules and hand on plain tensors, so that hooks see what they would see in any network.
    """

    def __init__(self, preact: bool, tap: Callable[..., tuple[Tensor, Tensor]] | None):
        self.preact, self.tap = preact, tap
        self.last = False  # whether the block that is called now ends its group
        self.blocks: list[Tensor] = []
        self.before: list[Tensor] = []  # the maps before the ReLU, if ``preact``
        self.maps: list[Tensor] = []


class Group(nn.Sequential):
    """Residual blocks, one after the other, as one module."""

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        if record is None:
            return super().forward(x)
        for i, block in enumerate(self, 1):
            record.last = i == len(self)
            x = block(x, record=record)
            record.blocks.append(x)
        return x


def fixed(name: str, value: Any, default: Any) -> Any:
    """``value``, or ``default`` where torch.fx traces a network without a value for the argument ``name``.

    The traced network asserts that it is called with that default; ``concrete_args={name: value}`` traces another.
    """
    if not isinstance(value, fx.Proxy):
        return value
    torch._assert(value == default, f"the network was traced with {name}={default}: trace it again with concrete_args to have another")
    return default


# The name under which torch.export.save writes it; torch.export.load needs fastkd imported. PyTorch has no public
# function for this.
_register = getattr(torch.utils._pytree, "_register_namedtuple", None)
if _register is not None:
    _register(Features, serialized_type_name="fastkd.models.Features")
