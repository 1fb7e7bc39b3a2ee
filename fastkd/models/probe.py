"""What one forward pass shows of a network: where its logits, its last map and its ReLUs are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._private import TorchDispatchMode
from fastkd.errors import one_line


class Call(NamedTuple):
    """One call of the submodule ``name``: its first argument and its output, as they were."""

    name: str
    module: nn.Module
    taken: Any
    given: Any


_POOLS = (
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool1d,
    nn.AdaptiveAvgPool1d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool3d,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Probe:
    """One forward pass of ``network`` on two random images: the calls of ``names`` and of all submodules that
    have no children, in the order in which they end. The network is in the mode in which it is given.
    ``rounded``: the dtype to which it rounds numbers on purpose, by casting them there and back, or None.
    """

    def __init__(self, network: nn.Module, image_shape: Sequence[int], names: Collection[str], role: str):
        self.calls: list[Call] = []
        modules = {
            name: module for name, module in network.named_modules() if name in names or not _parent(module)
        }
        handles = [
            handle
            for name, module in modules.items()
            for handle in (
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after(name)),
            )
        ]
        self._taken: dict[nn.Module, Any] = {}
        parameter = next(network.parameters(), torch.zeros(()))
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
        try:
            with _differentiable(network), torch.enable_grad(), _Casts() as casts:
                self.output = network(images)
        except Exception as error:
            why = one_line(f"{type(error).__name__}: {error}")[:200]
            raise ValueError(
                f"image_shape is {tuple(image_shape)}: {role} {type(network).__name__} does not take such"
                f" images ({why})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        self.rounded = casts.rounded
        if not isinstance(self.output, Tensor) or self.output.dim() != 2:
            told = tuple(self.output.shape) if isinstance(self.output, Tensor) else type(self.output).__name__
            raise ValueError(f"{role} {type(network).__name__} gives {told}, wanted logits (N, K)")

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._taken[module] = _copied(args[0]) if args else None

    def _after(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self.calls.append(Call(name, module, self._taken.pop(module, None), _copied(output)))

        return note

    def classifier(self) -> str | None:
        """The last ``nn.Linear`` whose output is the logits; else the last that is called."""
        linear = [call for call in self.calls if isinstance(call.module, nn.Linear)]
        found = [call for call in linear if _same(call.given, self.output)] or linear
        return found[-1].name if found else None

    def taken_by(self, name: str) -> Any:
        return next((call.taken for call in reversed(self.calls) if call.name == name), None)

    def final(self, pooled: Tensor) -> tuple[str, str] | None:
        """(submodule, "input" or "output") of the last map whose mean over space is ``pooled``.

        Where the images are so small that all such maps have one position, what the pooling takes.
        """
        maps = [
            (call, side, x)
            for call in self.calls
            for side, x in (("input", call.taken), ("output", call.given))
            if isinstance(x, Tensor) and x.dim() >= 3 and x.is_floating_point() and _is_mean(x, pooled)
        ]
        for call, side, x in reversed(maps):
            if x.shape[2:].numel() > 1 or (side == "input" and isinstance(call.module, _POOLS)):
                return call.name, side
        return (maps[0][0].name, maps[0][1]) if maps else None

    def before_relu(self, point: str) -> tuple[str, str] | None:
        """(submodule, side) of the map whose ReLU is the output of ``point``; None where that ReLU is no
        module, or is called later too.
        """
        places = [i for i, call in enumerate(self.calls) if call.name == point]
        end = places[-1] if places else -1
        for i in range(end, -1, -1):
            call = self.calls[i]
            if isinstance(call.module, nn.ReLU) and _same(call.given, self.calls[end].given):
                later = any(other.module is call.module for other in self.calls[i + 1 :])
                return None if later else (call.name, "input")
        return None

    def norm_before(self, name: str, side: str) -> nn.Module | None:
        """The batch norm whose output, or a sum that begins with it, is the map at ``(name, side)``."""
        call = next((call for call in reversed(self.calls) if call.name == name), None)
        x = None if call is None else call.taken if side == "input" else call.given
        node = x.grad_fn if isinstance(x, Tensor) else None
        norms = {
            id(call.module.weight): call.module for call in self.calls if isinstance(call.module, _NORMS)
        }
        while node is not None:
            leaves = [getattr(other, "variable", None) for other, _ in node.next_functions]
            for leaf in leaves:
                if id(leaf) in norms:
                    return norms[id(leaf)]
            if not node.name().startswith(("Add", "Clone", "AsStrided", "View", "Alias")):
                return None
            node = node.next_functions[0][0]
        return None


class _Casts(TorchDispatchMode):
    """Looks for ``x.to(bfloat16).float()`` among the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: torch.dtype | None = None
        self.narrow: list[Tensor] = []  # held, so that no other tensor has the address of one of them

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            bits = [torch.finfo(x.dtype).bits if x.is_floating_point() else 0 for x in (args[0], found)]
            if 0 < bits[1] < bits[0]:
                self.narrow.append(found)
            elif 0 < bits[0] < bits[1] and any(x is args[0] for x in self.narrow):
                self.rounded = args[0].dtype
        return found


def _parent(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _is_mean(x: Tensor, pooled: Tensor) -> bool:
    if x.shape[:2] != pooled.shape:
        return False
    return torch.allclose(x.flatten(2).mean(2), pooled, rtol=1e-3, atol=1e-5)


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Parameters of norms require gradients inside, so that the graph shows which norm it is."""
    frozen = [
        parameter
        for module in network.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters()
        if not parameter.requires_grad
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
