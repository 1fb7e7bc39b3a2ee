"""Drop-in for ``distiller_zoo``'s ``Attention``, ``FSP`` and ``DistillKL`` of HobbitLong/RepDistiller.

``from fastkd.compat.repdistiller import Attention, FSP, DistillKL``. As there, the first two return a list, one scalar a stage or pair,
and no coefficient is applied: the training script multiplies by its ``-b``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.modules import NumbersAsFloats
from fastkd.ops.attention import attention_transfer_loss
from fastkd.ops.gram import fsp_loss
from fastkd.reference import kd_loss


class Attention(NumbersAsFloats):
    """``Attention(p)(g_s, g_t)`` -> one attention-transfer loss a stage."""

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [attention_transfer_loss(f_s, f_t, self.p, signed=True) for f_s, f_t in zip(g_s, g_t, strict=True)]


class FSP(nn.Module):
    """``FSP(s_shapes, t_shapes)(g_s, g_t)`` -> one FSP loss a pair of consecutive stages; ValueError where channels differ."""

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if len(s_shapes) != len(t_shapes):
            raise ValueError(f"s_shapes has {len(s_shapes)} stages, t_shapes has {len(t_shapes)}: wanted the same number")
        for i, (s, t) in enumerate(zip(s_shapes, t_shapes, strict=True)):
            if s[1] != t[1]:
                raise ValueError(f"s_shapes[{i}] is {tuple(s)}, t_shapes[{i}] is {tuple(t)}: channels differ, FSP wanted the same number")

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [fsp_loss(g_s[i : i + 2], g_t[i : i + 2]) for i in range(len(g_s) - 1)]


class DistillKL(NumbersAsFloats):
    """``DistillKL(T)(y_s, y_t)`` -> T^2 KL, summed over classes, mean over the batch."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kd_loss(y_s, y_t, self.T)
