"""Features of any network: outputs of submodules that the user names, as :class:`Features`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.models.features import Features


def shows_features(network: nn.Module) -> bool:
    """Whether ``network(x, features=...)`` is understood, as by the networks of ``fastkd.models``."""
    return "features" in inspect.signature(network.forward).parameters


class _Kept:
    """What hooks keep of one forward pass, while ``on``."""

    def __init__(self) -> None:
        self.on = False
        self.found: dict[str, Any] = {}


class _Hook:
    """A forward hook, and a forward pre-hook: copied with its network, it belongs to the copy."""

    def __init__(self, kept: _Kept, key: str, place: str):
        self.kept, self.key, self.place = kept, key, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self.kept.on:
            self.kept.found[self.key] = args[0] if self.place == "input" else output


class Observed:
    """``observed(images, features) -> (Features, logits)`` of a network that knows no ``features``.

    ``stages`` and ``blocks`` are the outputs of the submodules ``points``, in the order of the forward pass,
    and so are those of ``preact``: whoever wants maps before a ReLU names the modules before it. ``pooled``
    is the input of ``classifier``, by default of the last ``nn.Linear``; ``final`` the last map whose mean
    over space that is, or None; there is no ``stem``. Nothing of a forward pass is kept, and the network's
    state dict has its own names. ``role`` stands in errors.
    """

    def __init__(
        self,
        network: nn.Module,
        points: Sequence[str] | None,
        classifier: str | None,
        image_shape: Sequence[int],
        role: str,
    ):
        self.network, self.points, self.kept = network, list(points or ()), _Kept()
        modules = dict(network.named_modules())
        if classifier is None:
            classifier = next(
                (name for name, module in reversed(modules.items()) if isinstance(module, nn.Linear)), ""
            )
        for name, argument in [
            *((point, f"{role}_points") for point in self.points),
            (classifier, "classifier"),
        ]:
            if not name or name not in modules:
                near = difflib.get_close_matches(name, modules, 3) or [key for key in modules if key][:3]
                raise ValueError(
                    f"{argument}: {role} has no submodule {name!r}, wanted one such as {', '.join(near)}"
                )
        for i, point in enumerate(self.points):
            modules[point].register_forward_hook(_Hook(self.kept, f"stage {i}", "output"))
        modules[classifier].register_forward_pre_hook(_Hook(self.kept, "pooled", "input"))
        final = self._find_final(image_shape)
        if final is not None:
            register = (
                final[0].register_forward_pre_hook if final[1] == "input" else final[0].register_forward_hook
            )
            register(_Hook(self.kept, "final", final[1]))

    def __call__(self, images: Tensor, features: bool | str = True) -> tuple[Features, Tensor]:
        logits, found = self._run(images)
        stages = tuple(found[f"stage {i}"] for i in range(len(self.points)))
        maps = Features((), stages, found["pooled"], stages, final=found.get("final"))  # type: ignore[arg-type]
        return (maps._replace(preact=maps) if features == "both" else maps), logits

    def _run(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        self.kept.on = True
        logits = self.network(images)
        self.kept.on = False
        found = self.kept.found
        self.kept.found = {}
        return logits, found

    def _find_final(self, image_shape: Sequence[int]) -> tuple[nn.Module, str] | None:
        """(module, whether its input or output) of the map whose mean is ``pooled``, by random images."""
        seen: list[tuple[nn.Module, str, Tensor]] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for place, x in (("input", args[0] if args else None), ("output", output)):
                if (
                    isinstance(x, Tensor)
                    and x.dim() >= 3
                    and x.is_floating_point()
                    and x.shape[2:].numel() > 1
                ):
                    seen.append((module, place, x))

        handles = [
            module.register_forward_hook(note)
            for module in self.network.modules()
            if not [*module.children()]
        ]
        try:
            draw = torch.Generator().manual_seed(0)
            images = torch.randn(2, *image_shape, generator=draw).to(next(self.network.parameters()))
            pooled = self._run(images)[1]["pooled"]
        finally:
            for handle in handles:
                handle.remove()
        for module, place, x in reversed(seen):
            mean = x.flatten(2).mean(2)
            if mean.shape == pooled.shape and torch.allclose(mean, pooled, rtol=1e-3, atol=1e-5):
                return module, place
        return None
