"""The methods of a sum as one module: from both networks' features to one scalar a method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import _private, checks
from fastkd.methods.base import Batch, Distiller, Output, Points, overrides, union
from fastkd.methods.definition import Definition
from fastkd.models.extract import Point
from fastkd.models.observed import Observed
from fastkd.reference.common import widen


class Losses(NamedTuple):
    """The losses of a batch. ``total`` is the sum of ``terms``, scalars by name: "ce" where there are labels,
    then one per method.

    ``student_logits`` and ``teacher_logits`` are as the losses see them, in float32 at least. ``records``, by
    method, are for :meth:`fastkd.Distillation.update` after the optimizer's step; most methods have none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    student_logits: Tensor
    teacher_logits: Tensor | None
    records: dict[str, Any]


class MethodSum(nn.ModuleDict):
    """The built methods by name, in the order of the sum. ``weights`` (one a method, float32) are the factors
    of their losses in the current epoch, 1 until :meth:`begin_epoch`.
    """

    weights: Tensor

    def __init__(self, distillers: Mapping[str, Distiller], definition: Definition):
        super().__init__(distillers)
        self._name, self._ce = definition.name, definition.ce
        kinds = {name: type(distiller) for name, distiller in distillers.items()}
        self._until = {term.name: term.until for term in definition.terms if term.until is not None}
        self._scheduled = {
            name: i
            for i, name in enumerate(kinds)
            if overrides(kinds[name], "weight_at") or name in self._until
        }
        self._changes_logits = [name for name in kinds if overrides(kinds[name], "logits")]
        self.register_buffer("weights", torch.ones(len(kinds)), persistent=False)

    def points(self, role: str, view: Observed | None, named: Sequence[Point] | None) -> Points:
        """The features that the methods read of the network ``role``: "student" or "teacher".

        ``view`` gives those of a network that is not of ``fastkd.models``, by the submodules that the user
        ``named``.
        Raises ValueError where a method wants maps and the view has none.
        """
        asked = union(getattr(distiller, f"{role}_points") for distiller in self.values())
        if asked and view is not None and not view.points:
            raise ValueError(
                f"{role}_points is {named!r}, but method {self._name!r} reads maps of the {role}:"
                " name submodules"
            )
        return asked

    def settled_options(self) -> dict[str, Any]:
        """See :meth:`fastkd.Distillation.settled`."""
        return {
            f"{name}.{key}": value for name in self for key, value in self._distiller(name).settled.items()
        }

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """See :meth:`fastkd.Distillation.set_epoch`."""
        epoch, epochs = checks.epoch_of(epoch, epochs)
        for name in self:
            self._distiller(name).set_epoch(epoch, epochs)
        for name, place in self._scheduled.items():
            ended = epoch >= self._until.get(name, epochs)
            self.weights[place].fill_(0.0 if ended else self._distiller(name).weight_at(epoch, epochs))

    def seen_logits(self, z: Tensor) -> Tensor:
        """Logits as every loss of the sum sees them: in float32 at least, and as a method may change them."""
        (z,) = widen(z)
        for name in self._changes_logits:
            z = self._distiller(name).logits(z)
        return z

    def cross_entropy(self, logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """The student's loss on ``labels`` as "ce", times its weight; nothing where it has none."""
        if labels is None or not self._ce:
            return {}
        if not torch.compiler.is_compiling() and not _without_values():
            if not isinstance(labels, Tensor):
                raise TypeError(f"labels is {type(labels).__name__}, wanted a tensor (N,) of int64")
            checks.label_values(labels, logits.shape[1])
        # on a cast of its own: the gradients of cross-entropy and of the other losses are rounded to half
        # precision before they are added, as in published code
        return {"ce": F.cross_entropy(self.seen_logits(logits), labels) * self._ce}

    def losses(
        self,
        batch: Batch,
        student: Output,
        teacher: Output,
        autocast: AbstractContextManager[Any],
        names: Iterable[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(losses, records) by name, of all methods or of ``names``.

        The methods' convolutions run under ``autocast``, their losses under none.
        """
        losses: dict[str, Tensor] = {}
        records: dict[str, Any] = {}
        with autocast:
            connected = {
                name: self._distiller(name).connect(batch, student, teacher)
                for name in (self if names is None else names)
            }
        with _no_autocast(batch.images):
            for name, links in connected.items():
                found = self._distiller(name).loss(batch, student, teacher, links)
                if isinstance(found, tuple):
                    found, records[name] = found
                losses[name] = (
                    found * self.weights[self._scheduled[name]] if name in self._scheduled else found
                )
        return losses, records

    def hand_back(self, index: Tensor, records: Mapping[str, Any]) -> None:
        """See :meth:`fastkd.Distillation.update`."""
        for name, record in records.items():
            self._distiller(name).update(index, record)

    def _distiller(self, name: str) -> Distiller:
        return self[name]  # type: ignore[return-value]


def _without_values() -> bool:
    """Whether a tracer, a transform or a dispatch mode is active, under which tensors may have no values."""
    return _private.recorded_elsewhere() or _private.dispatch_watched()


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return (
        torch.autocast(x.device.type, enabled=False)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type)  # meta tensors have no autocast
        else nullcontext()
    )
