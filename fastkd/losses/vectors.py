"""Losses of logits and of embeddings: KD, DKD, RKD, CRD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import checks
from fastkd.losses.base import Loss
from fastkd.ops.crd import crd_loss
from fastkd.ops.rkd import rkd_loss
from fastkd.reference import dkd_loss, kd_loss
from fastkd.reference.common import accumulator


class KD(Loss):
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
        return kd_loss(student, teacher, mask=mask, **self._keywords())


class DKD(Loss):
    """:func:`fastkd.dkd_loss` with its further arguments fixed; each is an attribute.

    ``forward(student_logits, teacher_logits, labels)``: (N, K) twice and (N,) -> scalar, times ``weight``.

    Presets, both of mdistiller, its authors' code: ``mdistiller``, for CIFAR, T = 4, alpha 1, beta 8 (a
    pair's own is in the method ``dkd``); ``imagenet``: T = 1, alpha 1, beta 0.5.
    """

    def __init__(
        self, temperature: float = 4.0, *, alpha: float = 1.0, beta: float = 8.0, weight: float = 1.0
    ) -> None:
        super().__init__(temperature=temperature, alpha=alpha, beta=beta, weight=weight)

    function = staticmethod(dkd_loss)
    presets = {
        "mdistiller": {"temperature": 4.0, "alpha": 1.0, "beta": 8.0},
        "imagenet": {"temperature": 1.0, "alpha": 1.0, "beta": 0.5},
    }

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return dkd_loss(student, teacher, labels, **self._keywords())


class RKD(Loss):
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


class CRD(Loss):
    """:func:`fastkd.crd_loss` with its banks and normalizers as buffers, copies of what is given here, and
    its arguments as attributes. Normalizers are in float32, in float64 where a bank is; they stay so where
    the module is moved to half precision.

    ``forward(student, teacher, rows=None)``: (N, D) twice and (N, K + 1) -> (scalar, times ``weight``,
    normalizers (2,)). It changes nothing: :meth:`update` does, after the optimizer's step. ``rows`` of the
    constructor stand in where ``forward`` gets none.

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
            dtype=accumulator((student_bank, teacher_bank)),
            device=student_bank.device,
        )
        self.register_buffer("normalizers", given.detach().clone())
        self.register_buffer("rows", rows, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CRD:
        """``half()`` and the like do not convert the normalizers, which may be too large for float16."""
        given = self.normalizers
        super()._apply(fn, recurse)
        if self.normalizers.dtype in (torch.float16, torch.bfloat16):
            self.normalizers = given.to(self.normalizers.device)
        return self

    function = staticmethod(crd_loss)  # type: ignore[assignment]
    presets = {
        "repdistiller": {"temperature": 0.07, "weight": 0.8},
        "mdistiller": {"temperature": 0.07, "weight": 0.8},
        "kdzoo": {"temperature": 0.1, "weight": 0.8},
    }

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        drawn: Any = self.rows if rows is None else rows
        banks = self.student_bank, self.teacher_bank
        return crd_loss(student, teacher, *banks, drawn, normalizers=self.normalizers, **self._keywords())

    @torch.no_grad()
    def update(
        self, index: Tensor, student: Tensor, teacher: Tensor, normalizers: Tensor, momentum: float = 0.5
    ) -> None:
        """Moves the rows ``index`` (N,) of the banks to ``momentum * row + (1 - momentum) * embedding``,
        brought to length 1.

        ``student``, ``teacher``: (N, D), the embeddings of those images. ``normalizers`` (2,) are taken where
        there are none yet. Of an index that occurs twice, the last row is the one that stays.

        Raises: TypeError, ValueError for an index that is not a row of the banks.
        """
        checks.image_numbers("index", index, len(student))
        if not torch.compiler.is_compiling():
            checks.crd_rows(index, len(self.student_bank), "index")
        places = torch.arange(len(index), device=index.device)
        # written several times by several threads, a row must be the same each time
        last = torch.where(index[:, None] == index, places, -1).amax(1)
        student, teacher = student[last], teacher[last]
        for bank, found in ((self.student_bank, student), (self.teacher_bank, teacher)):
            row = momentum * bank[index] + (1 - momentum) * found
            bank[index] = (row / row.norm(dim=1, keepdim=True)).to(bank.dtype)
        self.normalizers.copy_(torch.where(self.normalizers > 0, self.normalizers, normalizers))
