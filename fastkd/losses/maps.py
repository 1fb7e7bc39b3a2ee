"""Losses of maps: attention transfer, FSP, SAKD, OFD, HCL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd import checks
from fastkd.checks import Features
from fastkd.losses.base import Loss
from fastkd.ops.attention import attention_transfer_loss
from fastkd.ops.fsp import fsp_loss
from fastkd.ops.hcl import hcl_loss
from fastkd.ops.ofd import ofd_loss
from fastkd.ops.sakd import sakd_loss

# these projects write x.pow(p), which is abs(x)**p at p = 2; `signed` makes any other p agree with them too
_SQUARED_MAPS = {"signed": True, "weight": 1000.0}


class AttentionTransfer(Loss):
    """:func:`fastkd.attention_transfer_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: a tensor each, or several, one a stage, -> scalar, times ``weight``.

    Presets: ``zagoruyko``, ``repdistiller``, ``mdistiller``, ``hankyul2``, ``torchdistill`` (its "code"
    mode): mean of squares, summed over the stages, 1000; ``kdzoo``: channel sum, norm + 1e-6, mean over the
    stages, 1000; ``paper``: equation 2, unsquared l2 distance, beta / 2 for the paper's beta of 0.1.
    """

    def __init__(
        self,
        p: float = 2.0,
        *,
        channel_reduce: str = "mean",
        signed: bool = False,
        eps: float = 1e-12,
        eps_mode: str = "clamp",
        pool: str = "before",
        pool_mode: str = "avg",
        difference: str = "squared",
        stage_reduce: str = "sum",
        weights: Sequence[float] | None = None,
        weight: float = 1.0,
        teacher_is_map: bool = False,
        student_is_map: bool = False,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            p=p,
            channel_reduce=channel_reduce,
            signed=signed,
            eps=eps,
            eps_mode=eps_mode,
            pool=pool,
            pool_mode=pool_mode,
            difference=difference,
            stage_reduce=stage_reduce,
            weights=weights,
            weight=weight,
            teacher_is_map=teacher_is_map,
            student_is_map=student_is_map,
            channel_dim=channel_dim,
        )

    function = staticmethod(attention_transfer_loss)
    presets = {
        "zagoruyko": _SQUARED_MAPS,
        "repdistiller": _SQUARED_MAPS,
        "mdistiller": _SQUARED_MAPS,
        "kdzoo": {
            "channel_reduce": "sum",
            "eps": 1e-6,
            "eps_mode": "add",
            "stage_reduce": "mean",
            "weight": 1000.0,
        },
        "hankyul2": _SQUARED_MAPS,
        "torchdistill": _SQUARED_MAPS,
        "paper": {"channel_reduce": "sum", "difference": "l2", "weight": 0.05},
    }


class FSP(Loss):
    """:func:`fastkd.fsp_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: L >= 2 stage features each -> scalar, times ``weight``.

    Presets: ``repdistiller``: sum over pairs, 1; ``kdzoo``: mean over pairs, 1; ``hankyul2``: mean over
    pairs, 1/3; ``torchdistill``: max pooling, l2 norms of the columns, 1; ``paper``: max pooling, squared
    Frobenius norm, 1.
    """

    def __init__(
        self,
        *,
        pool_mode: str = "avg",
        distance: str = "squared",
        pair_reduce: str = "sum",
        weights: Sequence[float] | None = None,
        weight: float = 1.0,
        precision: str | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            pool_mode=pool_mode,
            distance=distance,
            pair_reduce=pair_reduce,
            weights=weights,
            weight=weight,
            precision=precision,
            channel_dim=channel_dim,
        )

    function = staticmethod(fsp_loss)
    presets = {
        "repdistiller": {"weight": 1.0},
        "kdzoo": {"pair_reduce": "mean", "weight": 1.0},
        "hankyul2": {"pair_reduce": "mean", "weight": 1 / 3},
        "torchdistill": {"pool_mode": "max", "distance": "column_l2", "weight": 1.0},
        "paper": {"pool_mode": "max", "distance": "frobenius", "weight": 1.0},
    }


class SAKD(Loss):
    """:func:`fastkd.sakd_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: a tensor each, or several, one a stage, -> scalar, times ``weight``.

    Presets: ``sakd``: 200, its authors' for CIFAR; ``imagenet``: 100, theirs for ImageNet.
    """

    def __init__(
        self, *, weights: Sequence[float] | None = None, weight: float = 200.0, channel_dim: int = 1
    ) -> None:
        super().__init__(weights=weights, weight=weight, channel_dim=channel_dim)

    function = staticmethod(sakd_loss)
    presets = {"sakd": {"weight": 200.0}, "imagenet": {"weight": 100.0}}


class OFD(Loss):
    """:func:`fastkd.ofd_loss` with its margins and options fixed; the margins are buffers, checked here.

    ``forward(student, teacher)``: (N, C, *S) a stage, before the ReLU, -> scalar, times ``weight``.

    Presets, ``OFD.preset("ofd", margins=...)``: ``ofd``, ``mdistiller``: 0.001.
    """

    def __init__(
        self,
        margins: Features,
        *,
        weights: Sequence[float] | None = None,
        weight: float = 1e-3,
        channel_dim: int = 1,
    ) -> None:
        super().__init__(weights=weights, weight=weight, channel_dim=channel_dim)
        found = checks.ofd_margins(margins, values=True)
        self._margins = tuple(f"margin_{i}" for i in range(len(found)))
        for name, margin in zip(self._margins, found, strict=True):
            self.register_buffer(name, margin.detach().clone())

    function = staticmethod(ofd_loss)
    presets = {"ofd": {"weight": 1e-3}, "mdistiller": {"weight": 1e-3}}

    def forward(self, student: Features, teacher: Features) -> Tensor:
        margins = [getattr(self, name) for name in self._margins]
        return ofd_loss(student, teacher, margins, **self._keywords())


class HCL(Loss):
    """:func:`fastkd.hcl_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: a tensor (N, C, H, W) each, or one a level -> scalar times ``weight``.

    Presets: ``reviewkd``, ``mdistiller``: weight 1; for that of a pair see ``fastkd.methods.reviewkd``.
    """

    def __init__(
        self, *, weights: Sequence[float] | None = None, weight: float = 1.0, channel_dim: int = 1
    ) -> None:
        super().__init__(weights=weights, weight=weight, channel_dim=channel_dim)

    function = staticmethod(hcl_loss)
    presets = {"reviewkd": {"weight": 1.0}, "mdistiller": {"weight": 1.0}}
