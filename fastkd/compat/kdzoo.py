"""Drop-in for ``kd_losses``' ``AT``, ``FSP`` and ``SoftTarget`` of AberHu/Knowledge-Distillation-Zoo.

``from fastkd.compat.kdzoo import AT, FSP, SoftTarget``. As there, each call serves one stage or pair and no
coefficient is applied.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastkd.losses import NumbersAsFloats
from fastkd.ops.attention import attention_map, attention_transfer_loss
from fastkd.ops.fsp import fsp_loss, fsp_matrix
from fastkd.reference import kd_loss


class AT(NumbersAsFloats):
    """``AT(p)(fm_s, fm_t)`` -> mean squared difference of the maps, sums over channels of abs(x)^p divided by
    (norm + 1e-6).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        return attention_transfer_loss(fm_s, fm_t, self.p, channel_reduce="sum", eps=1e-6, eps_mode="add")

    def attention_map(self, fm: Tensor, eps: float = 1e-6) -> Tensor:
        """The normalized map (N, 1, H, W) of a feature (N, C, H, W)."""
        return attention_map(fm, self.p, channel_reduce="sum", eps=eps, eps_mode="add").unsqueeze(1)


class FSP(nn.Module):
    """``FSP()(fm_s1, fm_s2, fm_t1, fm_t2)``: mean squared difference of the two FSP matrices."""

    def forward(self, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor) -> Tensor:
        return fsp_loss((fm_s1, fm_s2), (fm_t1, fm_t2))

    def fsp_matrix(self, fm1: Tensor, fm2: Tensor) -> Tensor:
        """The FSP matrix (N, C1, C2) of two features."""
        return fsp_matrix(fm1, fm2)


class SoftTarget(NumbersAsFloats):
    """``SoftTarget(T)(out_s, out_t)`` -> T^2 KL, summed over classes, mean over the batch."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        return kd_loss(out_s, out_t, self.T)
