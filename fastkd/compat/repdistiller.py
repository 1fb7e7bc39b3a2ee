"""Drop-in for ``distiller_zoo``'s ``Attention``, ``FSP`` and ``DistillKL`` of HobbitLong/RepDistiller.

``from fastkd.compat.repdistiller import Attention, FSP, DistillKL``. As there, the first two return a list,
one scalar a stage or pair, and no coefficient is applied: the training script multiplies by its ``-b``. Where
student and teacher bring lists of different length, the shorter decides, as there. Besides lists, any
iterable of features is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd.checks import Features, stages
from fastkd.losses import NumbersAsFloats
from fastkd.ops.attention import attention_map, attention_transfer_loss
from fastkd.ops.fsp import fsp_loss, fsp_matrix
from fastkd.reference import kd_loss


class Attention(NumbersAsFloats):
    """``Attention(p)(g_s, g_t)`` -> one attention-transfer loss a stage."""

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Features, g_t: Features) -> list[Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(stages("g_s", g_s), stages("g_t", g_t))]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one stage."""
        return attention_transfer_loss(f_s, f_t, self.p, signed=True)

    def at(self, f: Tensor) -> Tensor:
        """The normalized map of a feature (N, C, H, W), as rows (N, H * W)."""
        return attention_map(f, self.p, signed=True).flatten(1)


class FSP(nn.Module):
    """``FSP(s_shapes, t_shapes)(g_s, g_t)`` -> a loss a pair of stages; ValueError if channels differ."""

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        if len(s_shapes) != len(t_shapes):
            raise ValueError(
                f"s_shapes has {len(s_shapes)} stages, t_shapes has {len(t_shapes)}: wanted the same number"
            )
        for i, (s, t) in enumerate(zip(s_shapes, t_shapes, strict=True)):
            if s[1] != t[1]:
                raise ValueError(
                    f"s_shapes[{i}] is {tuple(s)}, t_shapes[{i}] is {tuple(t)}: channels differ, FSP wanted"
                    " the same number"
                )

    def forward(self, g_s: Features, g_t: Features) -> list[Tensor]:
        s, t = stages("g_s", g_s), stages("g_t", g_t)
        return [fsp_loss(s[i : i + 2], t[i : i + 2]) for i in range(min(len(s), len(t)) - 1)]

    def compute_fsp(self, g: Features) -> list[Tensor]:
        """The FSP matrices of consecutive stages, (N, later channels, earlier channels)."""
        features = stages("g", g)
        return [fsp_matrix(top, bottom) for bottom, top in zip(features, features[1:])]

    def compute_loss(self, s: Tensor, t: Tensor) -> Tensor:
        """The mean squared difference of two of the matrices that ``compute_fsp`` makes."""
        return (s - t).pow(2).mean()


class DistillKL(NumbersAsFloats):
    """``DistillKL(T)(y_s, y_t)`` -> T^2 KL, summed over classes, mean over the batch.

    Logits (N, K), or (N, K, *S) as those of a segmentation: then summed over positions too and, as there,
    divided by N alone.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        if y_s.dim() > 2 and y_s.shape == y_t.shape:
            s, t = (y.movedim(1, -1).flatten(0, -2) for y in (y_s, y_t))
            return kd_loss(s, t, self.T, reduction="sum", weight=1 / max(len(y_s), 1))
        return kd_loss(y_s, y_t, self.T)
