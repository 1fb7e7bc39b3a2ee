"""What a method is: cross-entropy plus distillation terms, each of which says which features it reads."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import backends
from fastkd.models import Features

Wanted = Literal[False, True, "preact"]


NO_FEATURES = Features((), (), (), ())  # type: ignore[arg-type]


class Output(NamedTuple):
    """One model's answer to a batch. ``features`` is there only if the method asked for them."""

    features: Features
    logits: Tensor


class Term(nn.Module):
    """One distillation loss. ``name`` is its column in the log, ``features`` what it reads of both models.

    ``forward(student, teacher)`` takes two Outputs and returns a scalar, the published coefficient included. Parameters, if it has any,
    are trained with the student.
    """

    name: str
    features: Wanted = False


class Method(nn.Module):
    """``forward(student, teacher, labels)`` -> the named terms of the loss, which is their sum.

    Only what the terms need is asked of the models: a method without terms needs no teacher at all (``needs_teacher``), one on logits
    no features (``features``). ``ce`` is the share of the cross-entropy; at 0 it is left out.
    """

    def __init__(self, *terms: Term, ce: float = 1.0):
        super().__init__()
        self.ce = ce
        self.terms = nn.ModuleList(terms)
        self.needs_teacher = bool(terms)
        wanted = {term.features for term in terms} - {False}
        if len(wanted) > 1:
            raise ValueError("terms before and after the ReLU cannot share one forward pass")
        self.features: Wanted = wanted.pop() if wanted else False
        self.names = (*["ce"][: ce != 0], *(str(term.name) for term in terms))

    def forward(self, student: Output, teacher: Output | None, labels: Tensor) -> dict[str, Tensor]:
        losses = {"ce": F.cross_entropy(student.logits.float(), labels) * self.ce} if self.ce else {}
        for term in self.terms:
            losses[str(term.name)] = term(student, teacher)
        return losses

    def run(self, model: nn.Module, images: Tensor) -> Output:
        """``model`` on ``images``, with the features that the terms read and no others."""
        return Output(*model(images, features=self.features)) if self.features else Output(NO_FEATURES, model(images))

    def alone(self) -> Method:
        """The same terms without cross-entropy."""
        return Method(*self.terms, ce=0.0)

    def check(self, student: nn.Module, teacher: nn.Module) -> dict[str, list[backends.Call]]:
        """Tries the terms on two blank images, before hours of training, on the models' device.

        Returns for each term the calls of the package's operations that it makes. Models that do not fit raise
        ValueError or TypeError, a backend that cannot serve them there BackendError.
        """
        modes = student.training, teacher.training
        image = next(student.parameters()).new_zeros(2, 3, 32, 32)
        with torch.no_grad():
            output, answer = self.run(student.eval(), image), self.run(teacher.eval(), image)
            self(output, answer, image.new_zeros(2, dtype=torch.int64))
            calls = {}
            for term in self.terms:
                with backends.record_calls() as calls[str(term.name)]:
                    term(output, answer)
        student.train(modes[0])
        teacher.train(modes[1])
        return calls
