"""Features of any network: the outputs of submodules that the user names."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd import _private

Point = str | tuple[str, Callable[[Any], Tensor]]
"""A submodule's name, or that and a function that makes a tensor of its output."""


class Place(NamedTuple):
    """What is taken of a network: the "output" or "input" (``side``) of a submodule. Errors name ``key``."""

    key: str
    name: str
    side: str = "output"
    change: Callable[[Any], Tensor] | None = None


class _Store:
    """The tensors that hooks take from one forward pass, while ``on``.

    A tensor that the network changes in place later, as ``nn.ReLU(inplace=True)`` does, is copied. Which ones
    that are shows in the first pass of each mode, which copies all of them.
    """

    def __init__(self) -> None:
        self.on = False
        self.found: dict[str, Tensor] = {}
        self.watched: dict[str, tuple[Tensor, int]] = {}
        self.mode = (False, False)
        self.copied: dict[tuple[bool, bool], set[str]] = {}

    def take(self, key: str, name: str, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{key}: {name!r} gives {type(x).__name__}, wanted a submodule that gives one tensor, or a"
                " pair of the name and a function that makes one of it"
            )
        if torch.compiler.is_compiling():  # where a copy of what does not change costs nothing
            self.found[key] = x.clone()
            return
        known, version = self.copied.get(self.mode), _private.version(x)
        if version is not None:
            self.watched[key] = x, version
        copies = known is None or version is None or key in known
        self.found[key] = x.clone() if copies else x

    def check_changes(self) -> None:
        """Learns, or finds wrong, which tensors are changed after they were taken."""
        watched, self.watched = self.watched, {}
        if not watched:
            return
        changed = {key for key, (x, version) in watched.items() if _private.version(x) != version}
        first = self.mode not in self.copied
        known = self.copied.setdefault(self.mode, set())
        new, self.copied[self.mode] = changed - known, known | changed
        if new and not first:
            raise RuntimeError(
                f"{', '.join(sorted(new))}: changed in place after it was taken, and not so in the first"
                " forward pass; from the next one on it is copied"
            )


class _Hook:
    """A forward hook or, for "input", a forward pre-hook. Copied with its network, it belongs to the copy."""

    def __init__(self, store: _Store, place: Place):
        self.store, self.place = store, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if self.store.on:
            key, name, side, change = self.place
            x = output if side == "output" else args[0]
            self.store.take(key, name, x if change is None else change(x))


class Outputs:
    """``run(*args) -> (tensors by key, the network's output)`` of a network's ``places``.

    The hooks stay on the network as long as this object lives, and do nothing in other calls of the network.
    Of a submodule that is called twice the last call counts. A tensor is returned as it left the submodule,
    even if it is changed in place later. What checkpointing computes again after the pass does not count.
    """

    def __init__(self, network: nn.Module, places: Sequence[Place]):
        self.network, self.places, self.store = network, list(places), _Store()
        handles = []
        for place in self.places:
            module, hook = network.get_submodule(place.name), _Hook(self.store, place)
            if place.side == "input":
                handles.append(module.register_forward_pre_hook(hook))
            else:
                handles.append(module.register_forward_hook(hook))
        weakref.finalize(self, _remove, handles)

    def run(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Any]:
        store = self.store
        store.found, store.mode = {}, (self.network.training, torch.is_grad_enabled())
        store.on = True
        try:
            output = self.network(*args, **kwargs)
        finally:
            store.on = False
            found = store.found
            store.found = {}
        if not torch.compiler.is_compiling():
            store.check_changes()
        silent = [f"{place.key} {place.name!r}" for place in self.places if place.key not in found]
        if silent:
            raise ValueError(
                f"{', '.join(silent)} did not run in this forward pass of"
                f" {type(self.network).__name__}, wanted submodules that it calls (and hooks that came before"
                " torch.compile)"
            )
        return found, output


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def places_of(
    network: nn.Module, points: Sequence[Point], argument: str, owner: str = "model"
) -> list[Place]:
    """The places of ``points``. Raises TypeError and ValueError that name ``argument``."""
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise TypeError(f"{argument} is {points!r}, wanted a list of names of submodules")
    places = []
    for i, point in enumerate(points):
        name, change = point if isinstance(point, tuple) and len(point) == 2 else (point, None)
        if not isinstance(name, str) or not (change is None or callable(change)):
            raise TypeError(
                f"{argument}[{i}] is {point!r}, wanted a name, or a pair of a name and a function"
            )
        find(network, name, argument, owner)
        places.append(Place(f"{argument}[{i}]", name, change=change or _declared(network, name)))
    return places


def find(network: nn.Module, name: str, argument: str, owner: str = "model") -> nn.Module:
    """The submodule ``name``. Raises ValueError, with the nearest names, and where hooks would be silent."""
    modules = dict(network.named_modules(remove_duplicate=False))
    if name not in modules and not _private.is_compiled(network):
        near = difflib.get_close_matches(name, modules, 3) or [key for key in modules if key][:3]
        raise ValueError(
            f"{argument}: {owner} has no submodule {name!r}, wanted one such as {', '.join(near)}"
        )
    parts = name.split(".") if name else []
    for each in [".".join(parts[:i]) for i in range(len(parts) + 1)]:  # the network itself is ""
        if _private.is_compiled(modules[each]):
            what = f"its submodule {each!r}" if each else f"{owner} itself"
            raise ValueError(
                f"{argument}: {what} is compiled, where hooks stay silent, wanted them before torch.compile"
            )
    return modules[name]


def _declared(network: nn.Module, name: str) -> Callable[[Any], Tensor] | None:
    """What makes (N, C, H, W) of the feature ``name``, where a network of timm declares it (N, H, W, C).

    That network may lie anywhere around the feature, in DistributedDataParallel or a module of the user's.
    """
    parts = name.split(".")
    for i in reversed(range(len(parts))):  # the innermost network that declares the feature decides
        owner, own_name = network.get_submodule(".".join(parts[:i])), ".".join(parts[i:])
        known = getattr(owner, "feature_info", None)
        known = getattr(known, "info", known)  # with features_only it is a FeatureInfo
        for info in known if isinstance(known, Sequence) else ():
            # with features_only layers.0 is called layers_0
            module = info.get("module") if isinstance(info, dict) else None
            if isinstance(module, str) and own_name in (module, module.replace(".", "_")):
                last = getattr(owner, "output_fmt", None) == "NHWC"
                return _ChannelsFirst(info.get("num_chs")) if last else None
    return None


class _ChannelsFirst:
    def __init__(self, channels: Any):
        self.channels = channels

    def __call__(self, x: Any) -> Tensor:
        last = isinstance(x, Tensor) and x.dim() == 4 and x.shape[3] == self.channels
        return x.permute(0, 3, 1, 2) if last else x


class Extractor(nn.Module):
    """See :func:`extract`. ``model`` is the network itself, whose names the state dict has."""

    def __init__(self, model: nn.Module, names: Sequence[Point]):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}, wanted a torch.nn.Module")
        places = places_of(model, names, "names")
        self.model, self.training = model, model.training
        self.names = tuple(place.name for place in places)
        self._outputs = Outputs(model, places)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], Any]:
        found, output = self._outputs.run(*args, **kwargs)
        return [found[place.key] for place in self._outputs.places], output

    def extra_repr(self) -> str:
        return f"names={list(self.names)}"


_PREFIX = "model."


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + _PREFIX)]:
        state[prefix + key[len(prefix + _PREFIX) :]] = state.pop(key)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + _PREFIX + key[len(prefix) :]] = state.pop(key)


def extract(model: nn.Module, names: Sequence[Point]) -> Extractor:
    """A module with ``forward(x) -> (features, output)``: the outputs of the submodules ``names``, and the
    model's own output.

        features, logits = fastkd.extract(model, ["layer2", "layer3", "layer4"])(images)

    Args:
        model: any ``nn.Module``; its weights, modes and names are left as they are, and it may be used
            beside.
        names: of ``model.named_modules()``, in the order in which the features are wanted. In place of a name
            a pair ``(name, function)`` gives ``function(output)``, for outputs that are no single tensor, or
            for tokens: ``("blocks.3", lambda x: fastkd.tokens_to_map(x, prefix=1))``.

    Returns: a module that takes the model's arguments and has its parameters, and its state dict under the
    model's names. It works in train and eval mode, under autocast, in DistributedDataParallel and around it,
    and is one graph under ``torch.compile(fullgraph=True)``. A feature is as it left the submodule, also
    where an operation in place follows; of a submodule that is called twice the last call counts. Features
    that a network of timm declares to be (N, H, W, C) come as views (N, C, H, W). While the
    module runs, no other thread may run the model, whose features would be mixed with its own.
    Raises: ValueError for an unknown name (with the nearest), for a model that is compiled, and at a forward
    pass in which a submodule does not run; TypeError for an output that is no tensor.
    """
    return Extractor(model, names)
