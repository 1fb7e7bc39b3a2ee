"""Puts a neck and another classifier into a network, of ``fastkd.models`` or any other."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from fastkd._private import forward_hooks
from fastkd.models.features import Neck, Record, through_neck


class NeckHook:
    """Sends a map through ``neck``. ``record``: where the neck writes what it shows, or None."""

    def __init__(self, neck: nn.Module, side: str):
        self.neck, self.side = neck, side
        self.record: Record | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> Any:
        x: Tensor = output if self.side == "output" else args[0]
        x = through_neck(self.neck, x, self.record)
        return x if self.side == "output" else (x, *args[1:])


class Parts(NamedTuple):
    """By name: a network's classifier, and the submodule whose input or output is the map that is pooled.

    Without ``final`` the network has an exchangeable ``neck``, as ours do.
    """

    classifier: str
    final: tuple[str, str] | None = None

    def put_neck(self, network: nn.Module, neck: nn.Module) -> None:
        """The map that is pooled goes through ``neck`` from now on, a submodule of that name."""
        if self.final is None:
            network.neck = neck
            return
        (name, side), own = self.final, "neck" if not hasattr(network, "neck") else "distillation_neck"
        module, hook = network.get_submodule(name), NeckHook(neck, side)
        # a Sequential would call it as its last layer
        (module if isinstance(network, nn.Sequential) else network).add_module(own, neck)
        if side == "input":
            module.register_forward_pre_hook(hook)
        else:
            module.register_forward_hook(hook)

    def put_classifier(self, network: nn.Module, classifier: nn.Module) -> None:
        network.set_submodule(self.classifier, classifier.train())


def neck_hooks(network: nn.Module) -> list[NeckHook]:
    """The hooks of ``network`` whose neck shows what it computes."""
    hooks = [hook for module in network.modules() for hook in forward_hooks(module)]
    return [hook for hook in hooks if isinstance(hook, NeckHook) and isinstance(hook.neck, Neck)]
