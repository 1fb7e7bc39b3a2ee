"""A cheaper copy of a teacher in eval mode: batch norms are folded into convolutions, and weights are cast
once to the dtype of the step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from fastkd.ops.batch_norm import untouched


def fold_for_inference(
    teacher: nn.Module, features: bool | str, dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``teacher`` in eval mode with fewer operations; the features that ``features`` asks for, and
    the logits, are the same but for rounding.

    A batch norm is folded where nothing but it reads its convolution's output: all of a CIFAR ResNet's, a
    wide ResNet's within its blocks. Where a user put hooks, a parametrization or a forward of its own on
    either, both stay. ``dtype``: what autocast would cast the weights of convolutions and linear layers to in
    every step; None leaves them. A model that ``torch.fx`` cannot follow keeps its batch norms.
    """
    model = copy.deepcopy(teacher).eval().requires_grad_(False)
    for conv, norm in foldable(model, features):
        layers: tuple[Any, Any] = model.get_submodule(conv), model.get_submodule(norm)
        model.set_submodule(conv, fuse_conv_bn_eval(*layers))
        model.set_submodule(norm, nn.Identity())
    for module in model.modules():
        if dtype is not None and isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return channels_last(model)


def channels_last(network: nn.Module) -> nn.Module:
    """``network`` with its convolutions channels_last, in place; but not one with ``nn.GroupNorm`` on a CPU,
    whose kernel loses the variance of such a map where its mean is large.
    """
    on_cpu = next(network.parameters(), torch.zeros(())).device.type == "cpu"
    if on_cpu and any(isinstance(module, nn.GroupNorm) for module in network.modules()):
        return network
    return network.to(memory_format=torch.channels_last)


def foldable(model: nn.Module, features: bool | str) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) pairs where only the batch norm reads the convolution's output."""
    asked = _Asked(model, features)
    try:
        graph = fx.Tracer().trace(asked)
    except Exception:  # whatever Python a user's model holds
        return []
    layers = dict(asked.named_modules())
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            readers.setdefault(str(node.target), []).append(node)
    found = []
    for name, nodes in readers.items():
        source = nodes[0].args[0] if untouched(layers[name], nn.BatchNorm2d) and len(nodes) == 1 else None
        if isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
            conv = str(source.target)
            if (
                untouched(layers[conv], nn.Conv2d)
                and len(readers[conv]) == 1
                and layers[name].track_running_stats
            ):
                found.append((conv.removeprefix("model."), name.removeprefix("model.")))
    return found


class _Asked(nn.Module):
    """A model with a fixed argument ``features``, as a function of the images alone."""

    def __init__(self, model: nn.Module, features: bool | str):
        super().__init__()
        self.model, self.features = model, features

    def forward(self, images: Tensor) -> Any:
        return self.model(images, features=self.features) if self.features else self.model(images)
