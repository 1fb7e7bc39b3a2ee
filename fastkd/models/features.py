"""The features that a network's ``forward`` returns itself, without hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fastkd import _private


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
    ``final``  (N, C, H, W), the map whose mean is pooled    the same
    ``neck``   what a :class:`Neck` shows of itself, or None the same
    ========== ============================================= ===========================================

    With ``features="preact"`` ``stages`` and ``blocks`` hold the maps before the ReLU instead: a ResNet's
    residual sums, a wide ResNet's sums after the batch norm that comes next. The other fields stay as they
    are. With ``features="both"`` ``stages`` and ``blocks`` are those of ``features=True``, and the field
    ``preact`` is what ``features="preact"`` gives; otherwise it is None. With ``features="pooled"`` only
    ``pooled``, ``final`` and ``neck`` are there; no other map is kept alive.
    """

    stem: Tensor
    stages: tuple[Tensor, ...]
    pooled: Tensor
    blocks: tuple[Tensor, ...]
    maps: tuple[Tensor, ...] = ()
    final: Any = None
    neck: Any = None
    preact: Any = None  # another Features


class Absent:
    """Stands for a feature that a network does not have. Any use of it raises ValueError, which says why."""

    def __init__(self, why: str):
        self.why = why

    def _refuse(self, *args: Any) -> Any:
        raise ValueError(self.why)

    __getitem__ = __len__ = __iter__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "why":  # what copying and tracing ask of any object
            raise AttributeError(name)
        raise ValueError(self.why)


FEATURES = (False, True, "preact", "both", "pooled")
"""Values of the argument ``features`` of a network's forward pass."""


class Record:
    """Collects for :class:`Features` what the blocks of one forward pass compute beside their outputs.

    Groups and blocks are called as modules and return plain tensors, so that hooks on them see the same as in
    any other network.
    """

    def __init__(self, features: bool | str, tap: Callable[..., tuple[Tensor, Tensor]] | None):
        if features not in FEATURES:
            raise ValueError(f"features is {features!r}, wanted one of {', '.join(map(repr, FEATURES))}")
        self.preact, self.tap = features in ("preact", "both"), tap
        if tap is not None and features not in (False, True):
            raise ValueError(
                f"tap and features={features!r} exclude each other: a tap goes with features False or True"
            )
        self.last = False  # whether the block that is called now ends its group
        self.blocks: list[Tensor] = []
        self.before: list[Tensor] = []  # the maps before the ReLU, if ``preact``
        self.maps: list[Tensor] = []
        self.neck: Any = None  # what the neck shows


class Neck(nn.Module):
    """A module that may take the place of a network's ``neck``, between the last map and the pooling, and
    show what it computes.

    ``forward(x, record=None)``: (N, C, H, W) -> (N, C', H', W'). With a record it sets ``record.neck``, which
    becomes ``Features.neck``. A neck that shows nothing may be any module with ``forward(x)``.
    """

    def forward(self, x: Tensor, record: Record | None = None) -> Tensor:
        raise NotImplementedError


def through_neck(neck: nn.Module, x: Tensor, record: Record | None) -> Tensor:
    return neck(x, record=record) if record is not None and isinstance(neck, Neck) else neck(x)


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


def shown(
    features: bool | str,
    record: Record,
    stem: Tensor,
    stages: list[Tensor],
    stages_before: list[Tensor],
    blocks_before: list[Tensor],
    pooled: Tensor,
    final: Tensor,
) -> Features:
    """What a network returns for ``features``, from the maps after and before the ReLU."""
    rest: dict[str, Any] = {"maps": tuple(record.maps), "final": final, "neck": record.neck}
    if features == "pooled":
        return Features((), (), pooled, (), **rest)  # type: ignore[arg-type]
    preact = (
        Features(stem, tuple(stages_before), pooled, tuple(blocks_before), **rest) if record.preact else None
    )
    if features == "preact" and preact is not None:
        return preact
    return Features(stem, tuple(stages), pooled, tuple(record.blocks), **rest, preact=preact)


def fixed(name: str, value: Any, default: Any) -> Any:
    """``value``, or ``default`` where torch.fx traces a network without a value for the argument ``name``.

    The traced network asserts this default; ``concrete_args={name: value}`` traces another.
    """
    if not isinstance(value, fx.Proxy):
        return value
    _private.assert_in_graph(
        value == default,
        f"the network was traced with {name}={default}: trace it again with concrete_args to have another",
    )
    return default


_private.register_named_tuple(Features, "fastkd.models.Features")
