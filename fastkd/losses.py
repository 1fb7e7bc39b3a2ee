"""The losses as modules, and every published variant of them as a preset.

A preset's ``weight`` is the coefficient its implementation multiplies the loss by. Sources:
szagoruyko/attention-transfer, HobbitLong/RepDistiller, megvii-research/mdistiller,
AberHu/Knowledge-Distillation-Zoo, hankyul2/KnowledgeDistillation, torchdistill, and the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastkd import checks
from fastkd.checks import Features
from fastkd.ops.attention import attention_transfer_loss
from fastkd.ops.crd import crd_loss
from fastkd.ops.fsp import fsp_loss
from fastkd.ops.rkd import rkd_loss
from fastkd.ops.sakd import sakd_loss
from fastkd.reference import hcl_loss, kd_loss, ofd_loss

_Self = TypeVar("_Self", bound="_Loss")


class NumbersAsFloats(nn.Module):
    """A number is checked when it becomes an attribute, and stored as a float."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, checks.option(name, value))


class _Loss(NumbersAsFloats):
    function: ClassVar[Callable[..., Tensor]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def preset(cls: type[_Self], name: str, **overrides: Any) -> _Self:
        """The published variant ``name``, its coefficient as ``weight``; keyword arguments replace single
        fields of it.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}, wanted one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})

    def forward(self, student: Any, teacher: Any) -> Tensor:
        return type(self).function(student, teacher, **{name: getattr(self, name) for name in self._options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)


# x.pow(p), as these write it, and abs(x)**p are one at p = 2; `signed` keeps another p true to them
_SQUARED_MAPS = {"signed": True, "weight": 1000.0}


class AttentionTransfer(_Loss):
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

    def forward(self, student: Features, teacher: Features) -> Tensor:
        return super().forward(student, teacher)


class FSP(_Loss):
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
    ) -> None:
        super().__init__(
            pool_mode=pool_mode,
            distance=distance,
            pair_reduce=pair_reduce,
            weights=weights,
            weight=weight,
            precision=precision,
        )

    function = staticmethod(fsp_loss)
    presets = {
        "repdistiller": {"weight": 1.0},
        "kdzoo": {"pair_reduce": "mean", "weight": 1.0},
        "hankyul2": {"pair_reduce": "mean", "weight": 1 / 3},
        "torchdistill": {"pool_mode": "max", "distance": "column_l2", "weight": 1.0},
        "paper": {"pool_mode": "max", "distance": "frobenius", "weight": 1.0},
    }

    def forward(self, student: Features, teacher: Features) -> Tensor:
        return super().forward(student, teacher)


class KD(_Loss):
    """:func:`fastkd.kd_loss` with its further arguments fixed; each is an attribute.

    It is the soft-target term alone, to which a recipe adds its share of cross-entropy.
    ``forward(student_logits, teacher_logits, mask=None)``: (N, K) twice -> scalar, times ``weight``.

    Presets, all with T = 4 and the share of cross-entropy that goes with each: ``zagoruyko``,
    ``repdistiller``, ``mdistiller`` 0.9 (with 0.1); ``kdzoo`` 0.1 (with 1); ``hankyul2`` 1 (with 1);
    ``torchdistill`` 0.1 (with 0.9, its CIFAR configurations).
    """

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        reduction: str = "batchmean",
        weight: float = 1.0,
        activation: str = "softmax",
    ) -> None:
        super().__init__(temperature=temperature, reduction=reduction, weight=weight, activation=activation)

    function = staticmethod(kd_loss)
    presets = {
        "zagoruyko": {"temperature": 4.0, "weight": 0.9},
        "repdistiller": {"temperature": 4.0, "weight": 0.9},
        "mdistiller": {"temperature": 4.0, "weight": 0.9},
        "kdzoo": {"temperature": 4.0, "weight": 0.1},
        "hankyul2": {"temperature": 4.0, "weight": 1.0},
        "torchdistill": {"temperature": 4.0, "weight": 0.1},
    }

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return kd_loss(student, teacher, mask=mask, **{name: getattr(self, name) for name in self._options})


class SAKD(_Loss):
    """:func:`fastkd.sakd_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: a tensor each, or several, one a stage, -> scalar, times ``weight``.

    Presets: ``sakd``: 200, its authors' for CIFAR; ``imagenet``: 100, theirs for ImageNet.
    """

    def __init__(self, *, weights: Sequence[float] | None = None, weight: float = 200.0) -> None:
        super().__init__(weights=weights, weight=weight)

    function = staticmethod(sakd_loss)
    presets = {"sakd": {"weight": 200.0}, "imagenet": {"weight": 100.0}}

    def forward(self, student: Features, teacher: Features) -> Tensor:
        return super().forward(student, teacher)


class RKD(_Loss):
    """:func:`fastkd.rkd_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: (N, ...) twice -> scalar, times ``weight``.

    Presets: ``repdistiller``, ``mdistiller``: distances 25, angles 50; ``lenscloth``, ``torchdistill``: 1, 2.
    """

    def __init__(
        self, *, distance_weight: float = 25.0, angle_weight: float = 50.0, weight: float = 1.0
    ) -> None:
        super().__init__(distance_weight=distance_weight, angle_weight=angle_weight, weight=weight)

    function = staticmethod(rkd_loss)
    presets = {
        "repdistiller": {"distance_weight": 25.0, "angle_weight": 50.0},
        "mdistiller": {"distance_weight": 25.0, "angle_weight": 50.0},
        "lenscloth": {"distance_weight": 1.0, "angle_weight": 2.0},
        "torchdistill": {"distance_weight": 1.0, "angle_weight": 2.0},
    }

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().forward(student, teacher)


class CRD(_Loss):
    """:func:`fastkd.crd_loss` with its banks and normalizers as buffers, copies of what is given here, and
    its arguments as attributes.

    ``forward(student, teacher, rows=None)``: (N, D) twice and (N, K + 1) -> (scalar, times ``weight``,
    normalizers (2,)). It changes
    nothing: :meth:`update` does, after the optimizer's step. ``rows`` of the constructor stand in where
    ``forward`` gets none.

    Presets, ``CRD.preset("kdzoo", student_bank=..., teacher_bank=...)``: ``repdistiller``, ``mdistiller``:
    temperature 0.07, weight 0.8; ``kdzoo``: 0.1 and 0.8, its weight for CIFAR-100 (0.2 for CIFAR-10).
    """

    student_bank: Tensor
    teacher_bank: Tensor
    normalizers: Tensor
    rows: Tensor | None

    def __init__(
        self,
        student_bank: Tensor,
        teacher_bank: Tensor,
        rows: Tensor | None = None,
        *,
        temperature: float = 0.07,
        normalizers: Tensor | Sequence[float] | None = None,
        eps: float = 1e-7,
        weight: float = 1.0,
    ) -> None:
        super().__init__(temperature=temperature, eps=eps, weight=weight)
        checks.crd_banks(student_bank, teacher_bank, normalizers)
        self.register_buffer("student_bank", student_bank.detach().clone())
        self.register_buffer("teacher_bank", teacher_bank.detach().clone())
        given = torch.as_tensor(
            (0.0, 0.0) if normalizers is None else normalizers,
            dtype=student_bank.dtype,
            device=student_bank.device,
        )
        self.register_buffer("normalizers", given.detach().clone())
        self.register_buffer("rows", rows, persistent=False)

    function = staticmethod(crd_loss)  # type: ignore[assignment]
    presets = {
        "repdistiller": {"temperature": 0.07, "weight": 0.8},
        "mdistiller": {"temperature": 0.07, "weight": 0.8},
        "kdzoo": {"temperature": 0.1, "weight": 0.8},
    }

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        options = {name: getattr(self, name) for name in self._options}
        rows = self.rows if rows is None else rows
        return crd_loss(
            student,
            teacher,
            self.student_bank,
            self.teacher_bank,
            rows,  # type: ignore[arg-type]
            normalizers=self.normalizers,
            **options,
        )

    @torch.no_grad()
    def update(
        self, index: Tensor, student: Tensor, teacher: Tensor, normalizers: Tensor, momentum: float = 0.5
    ) -> None:
        """Moves the rows ``index`` (N,) of the banks to ``momentum * row + (1 - momentum) * embedding``,
        brought to length 1.

        ``normalizers`` (2,) are taken where there are none yet. Of an index that occurs twice the last row
        stays.
        """
        places = torch.arange(len(index), device=index.device)
        # written several times by several threads, a row must be the same each time
        last = torch.where(index[:, None] == index, places, -1).amax(1)
        student, teacher = student[last], teacher[last]
        for bank, found in ((self.student_bank, student), (self.teacher_bank, teacher)):
            row = momentum * bank[index] + (1 - momentum) * found
            bank[index] = (row / row.norm(dim=1, keepdim=True)).to(bank.dtype)
        self.normalizers.copy_(torch.where(self.normalizers > 0, self.normalizers, normalizers))


class OFD(_Loss):
    """:func:`fastkd.ofd_loss` with its margins and options fixed; the margins are buffers, checked here.

    ``forward(student, teacher)``: (N, C, *S) a stage, before the ReLU, -> scalar, times ``weight``.

    Presets, ``OFD.preset("ofd", margins=...)``: ``ofd``, ``mdistiller``: 0.001.
    """

    def __init__(
        self, margins: Features, *, weights: Sequence[float] | None = None, weight: float = 1e-3
    ) -> None:
        super().__init__(weights=weights, weight=weight)
        found = checks.ofd_margins(margins, values=True)
        self._margins = tuple(f"margin_{i}" for i in range(len(found)))
        for name, margin in zip(self._margins, found, strict=True):
            self.register_buffer(name, margin.detach().clone())

    function = staticmethod(ofd_loss)
    presets = {"ofd": {"weight": 1e-3}, "mdistiller": {"weight": 1e-3}}

    def forward(self, student: Features, teacher: Features) -> Tensor:
        margins = [getattr(self, name) for name in self._margins]
        return ofd_loss(student, teacher, margins, **{name: getattr(self, name) for name in self._options})


class HCL(_Loss):
    """:func:`fastkd.hcl_loss` with its further arguments fixed; each is an attribute.

    ``forward(student, teacher)``: a tensor (N, C, H, W) each, or one a level -> scalar times ``weight``.

    Presets: ``reviewkd``, ``mdistiller``: weight 1; for that of a pair see ``fastkd.methods.reviewkd``.
    """

    def __init__(self, *, weights: Sequence[float] | None = None, weight: float = 1.0) -> None:
        super().__init__(weights=weights, weight=weight)

    function = staticmethod(hcl_loss)
    presets = {"reviewkd": {"weight": 1.0}, "mdistiller": {"weight": 1.0}}

    def forward(self, student: Features, teacher: Features) -> Tensor:
        return super().forward(student, teacher)
