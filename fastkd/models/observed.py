"""The features of any network under the fields of :class:`Features`, as fastkd's own networks give them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import _private, errors
from fastkd.models.exchange import Parts, neck_hooks
from fastkd.models.extract import Outputs, Place, Point, find, places_of
from fastkd.models.features import Absent, Features, Record
from fastkd.models.probe import Probe


def shows_features(network: nn.Module) -> bool:
    """Whether ``network(x, features=...)`` is understood, as by the networks of ``fastkd.models``."""
    return "features" in inspect.signature(network.forward).parameters


class Observed:
    """``observed(images, features) -> (Features, logits)`` of a network without an argument ``features``.

    ``stages`` and ``blocks`` are the outputs of the submodules ``points``, in the order of the forward pass.
    Those of ``preact`` are the maps before the ReLU where an output is that of an ``nn.ReLU``, else the
    outputs themselves. ``pooled`` is the input of ``classifier``, by default of the last ``nn.Linear``;
    ``final`` is the last map whose mean over space is ``pooled``; there is no ``stem``. A feature that the
    network does not have is :class:`Absent`. Nothing of a forward pass is kept, and the names of the state
    dict stay as they are. ``role``, "student" or "teacher", is for errors. The network must be in eval mode
    while this is built.
    """

    def __init__(
        self,
        network: nn.Module,
        points: Sequence[Point] | None,
        classifier: str | None,
        image_shape: Sequence[int],
        role: str,
    ):
        self.network, self.role = network, role
        self._arguments = (points, classifier, image_shape, role)
        stages = places_of(network, points or (), f"{role}_points", role)
        if classifier is not None:
            find(network, classifier, "classifier", role)
        probe = Probe(
            network, image_shape, {place.name for place in stages} | {classifier or ""} - {""}, role
        )
        self.casts = None if probe.rounded is None else _told_of_casts(role, network, probe.rounded)
        runs = {call.name: i for i, call in enumerate(probe.calls)}  # of several calls the last counts
        self.in_order = sorted((place.name for place in stages), key=lambda name: runs.get(name, -1))
        self.points, self.name = [place.key for place in stages], type(network).__name__
        self.names = [place.name for place in stages]
        self.classifier = classifier or probe.classifier()
        pooled = None if self.classifier is None else _flat(probe.taken_by(self.classifier))
        self.final = None if pooled is None else probe.final(pooled)
        before = [None if place.change else probe.before_relu(place.name) for place in stages]
        self.norms = [
            probe.norm_before(*(side or (place.name, "output")))
            for place, side in zip(stages, before, strict=True)
        ]
        places = list(stages)
        if pooled is not None and self.classifier is not None:
            places.append(Place("pooled", self.classifier, "input"))
        if self.final is not None:
            places.append(Place("final", *self.final))
        self.before = [side and f"before {place.key}" for place, side in zip(stages, before, strict=True)]
        places += [
            Place(key, *side)
            for key, side in zip(self.before, before, strict=True)
            if key is not None and side
        ]
        self.outputs, self.necks = Outputs(network, places), neck_hooks(network)

    def __call__(self, images: Tensor, features: bool | str = True) -> tuple[Features, Tensor]:
        if self.casts is not None and torch.compiler.is_compiling():
            _warn_of_casts(self.casts)
        record = Record(features=False, tap=None)
        for hook in self.necks:
            hook.record = record
        try:
            found, logits = self.outputs.run(images)
        finally:
            for hook in self.necks:
                hook.record = None
        if not isinstance(logits, Tensor):
            raise TypeError(f"{self.role} {self.name} gives {type(logits).__name__}, wanted logits (N, K)")
        stages = tuple(found[key] for key in self.points)
        rest = {"final": found.get("final", self._no_final()), "neck": record.neck}
        pooled: Any = _flat(found["pooled"]) if "pooled" in found else self._no_classifier()
        maps = Features((), stages, pooled, stages, **rest)  # type: ignore[arg-type]
        if features not in ("both", "preact"):
            return maps, logits
        before = tuple(found[own if key is None else key] for own, key in zip(self.points, self.before))
        preact = Features((), before, pooled, before, **rest)  # type: ignore[arg-type]
        return (preact if features == "preact" else maps._replace(preact=preact)), logits

    def refreshed(self) -> Observed:
        """A new view of the same network, to which a method has added modules."""
        return Observed(self.network, *self._arguments)

    def misordered(self) -> str | None:
        """A warning, one line, if the network runs the points in another order than given; else None."""
        if self.names == self.in_order or len({*self.names}) < len(self.names):
            return None
        return (
            f"{self.role}_points are {', '.join(self.names)}, and {self.role} {self.name} runs them as"
            f" {', '.join(self.in_order)}: stages are paired by their places, and the last counts as the"
            " deepest"
        )

    def parts(self) -> Parts:
        """Where a neck and another classifier may be put."""
        if self.final is None or self.classifier is None:
            raise ValueError((self._no_classifier() if self.classifier is None else self._no_final()).why)
        return Parts(self.classifier, self.final)

    def norms_before_relu(self) -> tuple[nn.Module, ...]:
        """The batch norm that ends in each of ``preact.stages``. Raises ValueError for a point without."""
        points = self._arguments[0] or ()
        for point, norm in zip(points, self.norms, strict=True):
            if norm is None:
                raise ValueError(f"{self.role}_points: no batch norm is found before the ReLU of {point!r}")
        return tuple(norm for norm in self.norms if norm is not None)

    def _no_classifier(self) -> Absent:
        return Absent(
            f"classifier is None, and {self.role} {self.name} calls no nn.Linear, whose input would be the"
            " pooled vector: name the classifier"
        )

    def _no_final(self) -> Absent:
        return Absent(
            f"{self.role} {self.name} has no map (N, C, H, W) whose mean is what its classifier"
            f" {self.classifier!r} takes"
        )


def _told_of_casts(role: str, network: nn.Module, dtype: torch.dtype) -> str:
    """The warning, one line, that a compiled network will not round numbers that it rounds on purpose."""
    return (
        f"{role} {type(network).__name__} rounds by a cast to {str(dtype).removeprefix('torch.')} and back,"
        " which inductor leaves out: before compiling, set"
        " torch._inductor.config.emulate_precision_casts = True"
    )


@_private.constant_in_graphs
def _warn_of_casts(text: str) -> bool:
    """Warns while a graph is traced, which then holds the answer and no call of this."""
    if not _private.casts_are_kept():
        errors.warn_once(text)
    return True


def _flat(x: Any) -> Any:
    """(N, C) of what a classifier takes, which may be (N, C, 1, 1); None of what is no tensor."""
    if not isinstance(x, Tensor):
        return None
    return x.flatten(1) if x.dim() > 1 and x.shape[2:].numel() == 1 else x


def views(
    networks: tuple[nn.Module, nn.Module],
    points: tuple[Sequence[Point] | None, Sequence[Point] | None],
    classifier: str | tuple[str | None, str | None] | None,
    image_shapes: tuple[Sequence[int], Sequence[int]],
) -> tuple[Observed | None, Observed | None]:
    """The view of each network that is not of ``fastkd.models`` or for which points are named, else None.

    All pairs have the student's part first.
    """
    foreign = [points[i] is not None or not shows_features(networks[i]) for i in range(2)]
    names = classifier if isinstance(classifier, tuple) else (classifier, classifier)
    if isinstance(classifier, str):
        has = [
            foreign[i] and classifier in dict(network.named_modules()) for i, network in enumerate(networks)
        ]
        if any(has):
            names = tuple(classifier if each else None for each in has)  # type: ignore[assignment]
    found = [
        Observed(network, points[i], names[i], image_shapes[i], role) if foreign[i] else None
        for i, (network, role) in enumerate(zip(networks, ("student", "teacher"), strict=True))
    ]
    return found[0], found[1]


def image_shape_of(*networks: nn.Module | None) -> tuple[int, ...]:
    """(3, H, W) of the images that one of the networks is built for, else (3, 32, 32)."""
    for network in networks:
        embedding = getattr(network, "patch_embed", None)
        size = getattr(network, "image_size", None) or getattr(embedding, "img_size", None)
        if isinstance(size, int):
            return 3, size, size
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(x, int) for x in size):
            return 3, *size
    return 3, 32, 32


__all__ = ["Observed", "image_shape_of", "shows_features", "views"]
