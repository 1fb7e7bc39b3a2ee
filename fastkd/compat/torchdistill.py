"""The losses as middle-level losses of torchdistill, with the keyword arguments of its own classes.

Where torchdistill is installed, importing this module registers ``FusedATLoss``, ``FusedFSPLoss``,
``FusedKDLoss``, ``FusedRKDLoss`` and ``FusedHierarchicalContextLoss``. A configuration file lists the module
under ``dependencies`` and writes ``key: 'FusedATLoss'`` in place of ``key: 'ATLoss'``; nothing else changes.

Each takes ``(student_io_dict, teacher_io_dict, targets)``, as there: module path -> {"input", "output"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastkd import checks, reference
from fastkd.ops.attention import attention_transfer_loss
from fastkd.ops.fsp import fsp_loss
from fastkd.ops.hcl import hcl_loss
from fastkd.ops.rkd import rkd_loss

IO = Mapping[str, Mapping[str, Any]]


def _feature(io: IO, place: Mapping[str, str]) -> Tensor:
    for known, name in ((io, place["path"]), (io.get(place["path"], {}), place["io"])):
        if name not in known:
            raise ValueError(
                f"{place['path']}, {place['io']}: {name!r} is not there, only {', '.join(known)}"
            )
    return io[place["path"]][place["io"]]


def _pairs(name: str, given: Any, ends: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """``given``, if each of its pairs has a place (path, io) under each of ``ends``. Raises ValueError."""
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{name} is {given!r}, wanted pairs by name")
    for key, pair in given.items():
        for end in ends:
            place = pair.get(end) if isinstance(pair, Mapping) else None
            if not isinstance(place, Mapping) or not {"path", "io"} <= {*place}:
                raise ValueError(f"{name}[{key!r}] has {place!r} for {end!r}, wanted its path and io")
        checks.number(f"{name}[{key!r}]['weight']", pair.get("weight", 1))
    return given


def _mean_alone(reduction: str) -> None:
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}, wanted 'mean': the fused loss has no other")


class FusedATLoss(nn.Module):
    """``ATLoss``: all pairs in one call of :func:`fastkd.attention_transfer_loss`.

    ``at_pairs``: name -> {"student": {"path", "io"}, "teacher": {...}, "weight": 1}. ``mode``: "code" is the
    authors' mean of squared differences, "paper" the norm of the differences, mean over the batch. Maps of
    different sizes, which the original refuses, are averaged to the smaller size.
    """

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **kwargs: Any) -> None:
        super().__init__()
        if mode not in ("code", "paper"):
            raise ValueError(f"mode is {mode!r}, wanted 'code' or 'paper'")
        self.at_pairs, self.mode = _pairs("at_pairs", at_pairs, ("student", "teacher")), mode

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        pairs = self.at_pairs.values()
        paper = self.mode == "paper"
        return attention_transfer_loss(
            [_feature(student_io_dict, pair["student"]) for pair in pairs],
            [_feature(teacher_io_dict, pair["teacher"]) for pair in pairs],
            channel_reduce="sum" if paper else "mean",
            difference="l2" if paper else "squared",
            weights=[float(pair.get("weight", 1)) for pair in pairs],
        )


class FusedFSPLoss(nn.Module):
    """``FSPLoss``: for each pair of layers the norms of the columns of the difference of the FSP matrices.

    ``fsp_pairs``: name -> {"student_first": {"path", "io"}, "student_second", "teacher_first",
    "teacher_second", "weight": 1}. Sizes are brought together by max pooling, as there.
    """

    def __init__(self, fsp_pairs: Mapping[str, Mapping[str, Any]], **kwargs: Any) -> None:
        super().__init__()
        ends = [f"{side}_{which}" for side in ("student", "teacher") for which in ("first", "second")]
        self.fsp_pairs = _pairs("fsp_pairs", fsp_pairs, ends)

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        terms = []
        for pair in self.fsp_pairs.values():
            student = [_feature(student_io_dict, pair[f"student_{which}"]) for which in ("first", "second")]
            teacher = [_feature(teacher_io_dict, pair[f"teacher_{which}"]) for which in ("first", "second")]
            weight = float(pair.get("weight", 1))
            terms.append(fsp_loss(student, teacher, pool_mode="max", distance="column_l2", weight=weight))
        return sum(terms[1:], start=terms[0])


class FusedKDLoss(nn.Module):
    """``KDLoss``: alpha * cross-entropy + beta * T^2 * KL; the KL alone, without T^2, where there are no
    targets or no alpha.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if alpha is None and beta is None:
            raise ValueError("alpha and beta are None, wanted one of them: beta is 1 - alpha by default")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value is not None:
                checks.number(name, value)
        checks.above_zero("temperature", temperature)
        checks.switch("reduction", reduction, checks.KD_REDUCTION)
        self.student = {"path": student_module_path, "io": student_module_io}
        self.teacher = {"path": teacher_module_path, "io": teacher_module_io}
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = 1 - alpha if beta is None else beta  # type: ignore[operator]
        hard = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=hard, **kwargs)

    def forward(
        self,
        student_io_dict: IO,
        teacher_io_dict: IO,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        logits = _feature(student_io_dict, self.student)
        hard = bool(self.alpha) and targets is not None
        # the original's soft loss has no T^2 of its own
        soft = reference.kd_loss(
            logits,
            _feature(teacher_io_dict, self.teacher),
            self.temperature,
            reduction=self.reduction,
            weight=self.beta if hard else self.temperature**-2,
        )
        return self.alpha * self.cross_entropy_loss(logits, targets) + soft if hard else soft


class FusedRKDLoss(nn.Module):
    """``RKDLoss``: distances and angles of the modules' outputs. A factor of None or 0 leaves a part out."""

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float | None,
        angle_factor: float | None,
        reduction: str = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _mean_alone(reduction)
        self.student = {"path": student_output_path, "io": "output"}
        self.teacher = {"path": teacher_output_path, "io": "output"}
        self.dist_factor = checks.number("dist_factor", dist_factor or 0.0)
        self.angle_factor = checks.number("angle_factor", angle_factor or 0.0)

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        return rkd_loss(
            _feature(student_io_dict, self.student),
            _feature(teacher_io_dict, self.teacher),
            distance_weight=self.dist_factor,
            angle_weight=self.angle_factor,
        )


class FusedHierarchicalContextLoss(nn.Module):
    """``HierarchicalContextLoss`` of one level of ReviewKD. As there, the student's module, an ABF of
    torchdistill, gives a tuple whose first item is the feature.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        reduction: str = "mean",
        output_sizes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _mean_alone(reduction)
        if output_sizes is not None and output_sizes not in ([4, 2, 1], (4, 2, 1)):
            raise ValueError(f"output_sizes is {output_sizes}, wanted [4, 2, 1]")
        self.student = {"path": student_module_path, "io": student_module_io}
        self.teacher = {"path": teacher_module_path, "io": teacher_module_io}

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        student: Any = _feature(student_io_dict, self.student)
        return hcl_loss(student[0], _feature(teacher_io_dict, self.teacher))


try:
    from torchdistill.losses.registry import register_mid_level_loss
except ImportError:  # the classes serve without it too
    pass
else:
    for _kind in (FusedATLoss, FusedFSPLoss, FusedKDLoss, FusedRKDLoss, FusedHierarchicalContextLoss):
        register_mid_level_loss(_kind)
