"""Networks of other libraries and of users' files, each by one name: "torchvision:resnet34", "timm:resnet18",
"nets.py:small". No weights are fetched.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd import plugins
from fastkd.errors import one_line
from fastkd.models.observed import shows_features
from fastkd.models.probe import Probe

FORMS = "torchvision:NAME, timm:NAME or path/to/file.py:FACTORY"
# arguments without which these two give a tuple in train mode, in place of logits
_SINGLE = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def is_spec(name: str) -> bool:
    """Whether ``name`` is of another library or file, and not of ``fastkd.models``."""
    return ":" in name


def is_foreign(name: str) -> bool:
    """Whether the network ``name`` is not fastkd's own: of another library or file, or registered."""
    return is_spec(name) or plugins.origin("model", name) is not None


def create(spec: str, num_classes: int) -> Any:
    """What the library or the file gives for ``num_classes``. Raises ValueError, one line."""
    source, _, name = spec.rpartition(":")
    if source == "torchvision":
        return _of_torchvision(name, num_classes)
    if source == "timm":
        return _of_timm(name, num_classes)
    if source.endswith(".py"):
        return _of_file(Path(source).expanduser(), name, num_classes)
    raise ValueError(f"model {spec!r} is not known, wanted {FORMS}")


def origin(spec: str) -> str | None:
    """Of a network in a user's file, the file's name and a hash of its text; None for any other."""
    source = spec.rpartition(":")[0]
    if not source.endswith(".py"):
        return None
    return str(getattr(plugins.of_file(Path(source).expanduser().resolve()), plugins.IMPORTED))


def stages_of(network: nn.Module) -> tuple[str, ...] | None:
    """The default points of a network; None where there are none.

    They are ``layer1`` to ``layer4`` of a ResNet and its kin, or what a network of timm declares: the last
    four of its stages, if each halves the map. A network of ``fastkd.models`` shows its own.
    """
    if shows_features(network):
        return None
    names = dict(network.named_modules())
    layers = tuple(f"layer{i}" for i in range(1, 5) if f"layer{i}" in names)
    if len(layers) > 1:
        return layers
    declared = getattr(network, "feature_info", None)
    if not isinstance(declared, Sequence) or not all(isinstance(info, dict) for info in declared):
        return None
    last = [info for info in declared if info.get("module") in names][-4:]
    halved = len({info.get("reduction") for info in last}) == len(last) > 1
    return tuple(info["module"] for info in last) if halved else None


def declared_normalization(
    network: nn.Module, spec: str = "", file: Path | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) by which timm, or torchvision for the network ``spec``, says that images are normalized for
    its published weights: for those in ``file`` where it is one of torchvision's, else for the usual ones.
    """
    declared = getattr(network, "pretrained_cfg", None)
    source, _, name = spec.rpartition(":")
    if source == "torchvision":
        try:
            published = _library("torchvision.models").get_model_weights(name)
            prepared = _weights_in(file, published).transforms()
            declared = {"mean": prepared.mean, "std": prepared.std}
        except (AttributeError, ValueError):  # a network without published weights
            return None
    mean, std = (declared.get(name) if isinstance(declared, dict) else None for name in ("mean", "std"))
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def _weights_in(file: Path | None, published: Any) -> Any:
    """The one of torchvision's ``published`` weights that ``file`` holds, whatever its name, else the usual.

    Their names there end in the beginning of the file's SHA-256. It is read only where that matters.
    """
    images = [each.transforms() for each in published]
    if file is None or len({(tuple(each.mean), tuple(each.std)) for each in images}) < 2:
        return published.DEFAULT
    sha = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                sha.update(block)
    except OSError:  # which is told where the weights are loaded
        return published.DEFAULT
    for each in published:
        if sha.hexdigest().startswith(each.url.removesuffix(".pth").rpartition("-")[2]):
            return each
    return published.DEFAULT


def suggested(network: nn.Module, image_shape: Sequence[int]) -> list[str]:
    """Points for a network without default ones: for each size of map the last submodule that gives it. The
    first size and that of one position are left out.
    """
    network.eval()
    last: dict[tuple[int, ...], str] = {}
    for call in Probe(network, image_shape, (), "network").calls:
        if isinstance(call.given, Tensor) and call.given.dim() == 4 and call.given.shape[2:].numel() > 1:
            last[tuple(call.given.shape[2:])] = call.name
    return list(last.values())[1:]


def file_name(name: str) -> str:
    """A model's name as a part of a file's name, another one for each file of a user."""
    if not is_spec(name):
        return name
    plain = re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])
    folder = name.rpartition("/")[0]
    return plain + (f"-{hashlib.blake2b(folder.encode(), digest_size=3).hexdigest()}" if folder else "")


def _of_torchvision(name: str, num_classes: int) -> nn.Module:
    models = _library("torchvision.models")
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(_unknown("torchvision", name, known))
    return models.get_model(name, weights=None, num_classes=num_classes, **_SINGLE.get(name, {}))


def _of_timm(name: str, num_classes: int) -> nn.Module:
    timm = _library("timm")
    if "/" in name or not timm.is_model(name):  # a name with a slash would be looked up in a network
        raise ValueError(_unknown("timm", name, timm.list_models()))
    return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _library(name: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"cannot be imported ({one_line(error)})"
        raise ValueError(f"{package} {why}: pip install {package}") from None


def _unknown(package: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"{package} has no network {name!r}" + (f", wanted one such as {', '.join(near)}" if near else "")


def _of_file(path: Path, name: str, num_classes: int) -> Any:
    try:
        module = plugins.of_file(path.resolve())
    except (Exception, SystemExit) as error:  # whatever a user's file does
        raise ValueError(f"{path} cannot be imported: {plugins.said(error)}") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        found = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{path} has no function {name!r}; it has {', '.join(found) or 'none'}")
    try:
        return factory(num_classes=num_classes)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {name}(num_classes={num_classes}) fails: {plugins.said(error)}") from None
