"""Drop-in for the losses in ``mdistiller.distillers`` of megvii-research/mdistiller.

The functions have the names, arguments and results of the originals: ``kd_loss``, ``dkd_loss``, ``at_loss``
and ``single_stage_at_loss``, ``rkd_loss``, ``feat_loss`` (OFD) and ``hcl_loss`` (ReviewKD). FitNet's
:class:`ConvReg` and :class:`CRD`, whose losses have a state, are modules. As there, no weight of the
configuration file is applied; where student and teacher bring lists of different length, the shorter decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import _private, checks, losses, reference
from fastkd.checks import Features, stages
from fastkd.methods import connectors
from fastkd.ops.attention import attention_transfer_loss
from fastkd.ops.hcl import hcl_loss as _hcl_loss
from fastkd.ops.ofd import ofd_loss
from fastkd.ops.rkd import rkd_loss as _rkd_loss

__all__ = [
    "CRD",
    "ConvReg",
    "at_loss",
    "dkd_loss",
    "feat_loss",
    "hcl_loss",
    "kd_loss",
    "rkd_loss",
    "single_stage_at_loss",
]


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL of logits (N, K), summed over classes, mean over the batch."""
    return reference.kd_loss(logits_student, logits_teacher, temperature)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """The decoupled loss of logits (N, K) and labels (N,), mean over the batch.

    The original takes the logarithm of summed probabilities, and gives infinity where one underflows; here it
    stays finite.
    """
    return reference.dkd_loss(logits_student, logits_teacher, target, temperature, alpha=alpha, beta=beta)


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """The attention-transfer loss of one stage, features (N, C, H, W)."""
    return attention_transfer_loss(f_s, f_t, p, signed=True)


def at_loss(g_s: Features, g_t: Features, p: float) -> Tensor:
    """The attention-transfer losses of all stages, summed."""
    pairs = [*zip(stages("g_s", g_s), stages("g_t", g_t))]
    return attention_transfer_loss([s for s, _ in pairs], [t for _, t in pairs], p, signed=True)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """The relational loss of features (N, ...), distances and angles.

    ``eps``, below which the original does not let a squared distance fall, has no effect: distances are
    taken from differences, and equal samples count with the distance 0. ValueError for ``squared``.
    """
    if squared:
        raise ValueError("squared is True, wanted False: the distances of RKD are not squared")
    return _rkd_loss(f_s, f_t, distance_weight=distance_weight, angle_weight=angle_weight)


def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """OFD's partial distance of one stage, summed over a sample, mean over the batch.

    ``source``, ``target``: (N, C, H, W) before the ReLU, of equal shape; ``margin``: C numbers, as (C,) or as
    the original's (1, C, 1, 1).
    """
    if checks.floating("margin", margin).numel() != max(margin.shape, default=0):
        raise ValueError(f"margin is {checks.describe(margin)}, wanted (C,) or (1, C, 1, 1)")
    return ofd_loss([source], [target], [margin.flatten()], weights=[1.0], weight=1.0)


def hcl_loss(fstudent: Features, fteacher: Features) -> Tensor:
    """ReviewKD's hierarchical context loss, summed over the levels (N, C, H, W)."""
    pairs = [*zip(stages("fstudent", fstudent), stages("fteacher", fteacher))]
    return _hcl_loss([s for s, _ in pairs], [t for _, t in pairs])


class ConvReg(connectors.ConvReg):
    """FitNet's regressor: ``ConvReg(s_shape, t_shape)(f_s)`` has the shape of the teacher's feature.

    ``s_shape``, ``t_shape``: (N, C, H, W). The loss is ``torch.nn.functional.mse_loss`` of the result.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True) -> None:
        for name, shape in (("s_shape", s_shape), ("t_shape", t_shape)):
            if not isinstance(shape, Sequence) or len(shape) != 4:
                raise ValueError(f"{name} is {shape}, wanted (N, C, H, W)")
        super().__init__(s_shape[1:], t_shape[1:], use_relu)


class CRD(nn.Module):
    """CRD with its embeddings and banks: ``CRD(...)(f_s, f_t, idx, contrast_idx)`` -> a scalar.

    The arguments are those of the original's ``init_crd_modules``; ``forward`` is its ``crd_loss``.
    ``f_s``, ``f_t``: the pooled vectors; ``idx`` (N,) the images' numbers in the training set;
    ``contrast_idx`` (N, k + 1) with the image itself first, then its negatives. As there, a call in train
    or eval mode moves the banks' rows ``idx``, and the first call sets the normalizers.
    """

    def __init__(
        self,
        feat_s_channel: int,
        feat_t_channel: int,
        feat_dim: int,
        num_data: int,
        k: int = 16384,
        momentum: float = 0.5,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        for name, count in (("feat_dim", feat_dim), ("num_data", num_data), ("k", k)):
            if count < 1:
                raise ValueError(f"{name} is {count}, wanted at least 1")
        self.k, self.momentum = k, momentum
        self.embed_s = nn.Linear(feat_s_channel, feat_dim)
        self.embed_t = nn.Linear(feat_t_channel, feat_dim)
        bound = (3 / feat_dim) ** 0.5
        banks = [torch.empty(num_data, feat_dim).uniform_(-bound, bound) for _ in range(2)]
        self.contrast = losses.CRD(*banks, temperature=temperature)

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor) -> Tensor:
        checks.image_numbers("idx", idx, len(f_s))
        if not torch.compiler.is_compiling():
            checks.crd_rows(idx, len(self.contrast.student_bank), "idx")
        if not isinstance(contrast_idx, Tensor):
            raise TypeError(f"contrast_idx is {type(contrast_idx).__name__}, wanted a tensor (N, k + 1)")
        if contrast_idx.shape[1:] != (self.k + 1,):
            raise ValueError(f"contrast_idx is {tuple(contrast_idx.shape)}, wanted (N, k + 1), k = {self.k}")
        s = F.normalize(self.embed_s(f_s.flatten(1)))
        t = F.normalize(self.embed_t(_private.saveable(f_t).flatten(1)))
        loss, normalizers = self.contrast(s, t, contrast_idx)
        self.contrast.update(idx, s.detach(), t.detach(), normalizers, self.momentum)
        return loss
