"""CIFAR ResNets and wide ResNets whose ``forward`` returns features. A new model is one file (or none) and
one line in ``_BUILDERS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from fastkd import plugins
from fastkd.checks.numbers import whole
from fastkd.errors import one_line
from fastkd.models import specs
from fastkd.models.features import Features, Neck
from fastkd.models.resnet import ResNet
from fastkd.models.weights import WeightsError, fingerprint, load_weights, read_checkpoint
from fastkd.models.wrn import WideResNet
from fastkd.seeds import seeded

_WIDE = (32, 64, 128, 256)

_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": lambda classes: ResNet(8, num_classes=classes),
    "resnet20": lambda classes: ResNet(20, num_classes=classes),
    "resnet32": lambda classes: ResNet(32, num_classes=classes),
    "resnet44": lambda classes: ResNet(44, num_classes=classes),
    "resnet56": lambda classes: ResNet(56, num_classes=classes),
    "resnet110": lambda classes: ResNet(110, num_classes=classes),
    "resnet8x4": lambda classes: ResNet(8, _WIDE, classes),
    "resnet32x4": lambda classes: ResNet(32, _WIDE, classes),
    "wrn_16_1": lambda classes: WideResNet(16, 1, classes),
    "wrn_16_2": lambda classes: WideResNet(16, 2, classes),
    "wrn_40_1": lambda classes: WideResNet(40, 1, classes),
    "wrn_40_2": lambda classes: WideResNet(40, 2, classes),
    "resnet_32_20": lambda classes: ResNet(20, num_classes=classes, stem_kernel=7),
    "resnet_32_110": lambda classes: ResNet(110, num_classes=classes, stem_kernel=7),
}

MODELS = tuple(_BUILDERS)


def register(name: str) -> Callable[[Callable[[int], nn.Module]], Callable[[int], nn.Module]]:
    """A decorator that adds a function ``(num_classes) -> nn.Module`` of your own as the model ``name``:

        @fastkd.models.register("small")
        def small(num_classes): ...

    Raises ValueError for a name that is there already. An entry point of the group "fastkd.models" does the
    same.
    """

    def add(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        _register(name, build)
        return build

    return add


def _register(name: str, build: Any, package: str = "") -> None:
    global MODELS
    if not callable(build):
        raise TypeError(f"model {name!r} is {build!r}, wanted a function of the number of classes")
    plugins.register("model", _BUILDERS, name, build, package)
    MODELS = tuple(_BUILDERS)


def create_model(name: str, num_classes: int = 10) -> nn.Module:
    """A freshly initialized model by its name, one of ``MODELS``, for (N, 3, 32, 32) images. Raises
    ValueError for an unknown name or for 0 classes, TypeError for arguments of another type.

    ``model(x)`` gives logits; with ``features`` True, "preact", "both" or "pooled" it gives ``(Features,
    logits)``. ``model.neck`` and ``model.fc`` may be exchanged; ``model.norms_before_relu()`` are the batch
    norms of ``preact.stages``.

    Other names make other networks: "torchvision:NAME" and "timm:NAME" those of these packages, without
    weights, and "path/to/file.py:FACTORY" what ``FACTORY(num_classes=...)`` of that file returns.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, wanted the name of a model, such as resnet20")
    if not whole(num_classes):
        raise TypeError(f"num_classes is {num_classes!r}, wanted a whole number")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, wanted at least 1")
    if specs.is_spec(name):
        network = specs.create(name, num_classes)
    else:
        plugins.find("model", _BUILDERS, name, _register)
        if name not in _BUILDERS:
            raise ValueError(f"model {name!r} is not known; known: {', '.join(MODELS)}, or {specs.FORMS}")
        network = _BUILDERS[name](num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model {name!r} gives {type(network).__name__}, wanted a torch.nn.Module")
    lazy = next((key for key, value in network.named_parameters() if is_lazy(value)), None)
    if lazy is not None:
        raise ValueError(f"model {name!r} has lazy parameters ({lazy}), wanted parameters with shapes")
    return network


def load_student(folder: str | Path, *, file: str = "best.pt") -> nn.Module:
    """The trained network of a run from its folder (``runs/simkd-cifar100-...``), in eval mode on the CPU:
    ready to predict, or to teach.

    It has what the run tested: SimKD's projector and classifier, NORM's pair. ``file``: "best.pt", the best
    epoch's weights, or "last.pt". Images must be normalized as in the run.

    Nothing but the file is read, unless the run's networks are "path/to/file.py:FACTORY": that file is
    imported, as it is now, from where the run found it, seen from the current folder. What a run had by
    ``--plugin`` must have been registered before. Raises WeightsError, one line.
    """
    path = Path(folder).expanduser() / file
    checkpoint = read_checkpoint(path)
    try:
        about = checkpoint["config"]
        classes = about.get("classes") or len(checkpoint["model"]["fc.weight"])  # older runs say no number
        with seeded(0, "load_student"):  # leaves the random numbers of the caller alone
            network = create_model(about["identity"]["model"], classes)
            if about["trained"] not in ("teacher", "baseline"):
                # imported here: they lie on a higher floor, and importing fastkd does without them
                methods = importlib.import_module("fastkd.methods")
                network = methods.wrapped(network, create_model(about["teacher"], classes), about)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        added: Any = checkpoint
        for key in ("config", "identity", "plugins"):  # other programs write what they like there
            added = added.get(key) if isinstance(added, dict) else {}
        if isinstance(added, dict) and added:
            why += f"; it needs {', '.join(f'{key} of {origin}' for key, origin in added.items())}"
        raise WeightsError(f"{path}: not the weights of a run of this version ({why})") from None
    load_weights(network, path)
    return network.eval()


__all__ = [
    "MODELS",
    "Features",
    "Neck",
    "ResNet",
    "WeightsError",
    "WideResNet",
    "create_model",
    "fingerprint",
    "load_student",
    "load_weights",
    "read_checkpoint",
    "register",
]
