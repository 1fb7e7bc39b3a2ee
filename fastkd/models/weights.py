"""Reading published weights: a bare state dict, or one under a key such as "model" among other things."""

from __future__ import annotations

import ctypes
import difflib
import hashlib
import os
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor, nn

KEYS = ("model", "state_dict", "net", "model_state_dict", "student", "ema")
"""Where a checkpoint may hold its weights, in the order in which they are looked for."""

_WRAPPERS = ("module", "_orig_mod")  # parts of names that DataParallel, DDP and torch.compile add
_COUNTERS = ("total_ops", "total_params", "n_averaged")  # buffers that thop's profiler and AveragedModel add


class WeightsError(ValueError):
    """A file that does not hold weights for this model; the message is one line for the user."""


class Unread:
    """Stands for an object in a file whose class is not loaded. Nothing of the class runs, and nothing that
    the file gives it is kept.
    """

    stands_as: type | None = None  # OrderedDict or list where the file puts items into it

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls) if cls.stands_as is None else cls.stands_as()

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        raise UnpicklingError(f"items of {type(self)}")

    def __repr__(self) -> str:
        return f"<{_name(type(self))}, not read>"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def read_checkpoint(path: str | Path) -> dict:
    """The dict in ``path``, on the CPU. Raises WeightsError.

    Loaded with ``weights_only=True``: a file never runs code. Objects of classes that PyTorch does not load
    so, such as the options that RepDistiller saves, are :class:`Unread`; dicts and lists of such classes come
    as plain ones.
    """
    try:
        file = open(os.path.expanduser(path), "rb")  # noqa: SIM115 - apart from the reading, whose OSErrors mean a damaged file
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    classes: list[type[Unread]] = []
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                loaded = _load(file, [])
            except UnpicklingError:
                classes = _classes(file)
                loaded = _load(file, classes)
    except Exception as error:  # torch.load raises half a dozen kinds, with messages of many lines
        refused = _refused(classes, str(error))
        why = (
            f"it holds {' and '.join(refused)}, which cannot be read"
            if refused
            else f"or truncated ({type(error).__name__})"
        )
        raise WeightsError(f"{path}: not a checkpoint of plain tensors, {why}") from None
    if not isinstance(loaded, dict):
        kind = type(loaded)
        what = f"an object of class {_name(kind)}" if isinstance(loaded, Unread) else f"a {kind.__name__}"
        raise WeightsError(
            f"{path}: holds {what}, wanted a state dict or a dict with one under"
            f" {' or '.join(map(repr, KEYS))}"
        )
    return loaded


def _load(file: IO[bytes], classes: list[type[Unread]]) -> Any:
    """``torch.load``, with ``classes`` in the place of those that have their names."""
    while True:
        file.seek(0)
        try:
            with torch.serialization.safe_globals([(kind, _name(kind)) for kind in classes]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            # items may be put into nothing but a dict or a list, so let what was named here be one
            kind = next(
                (kind for kind in classes if kind.stands_as is None and str(kind) in str(error)), None
            )
            if kind is None:
                raise
            # "append to lists, but got", or "extend lists": PyTorch 2.11 and 2.15, of several items
            kind.stands_as = list if "lists, but got" in str(error) else OrderedDict


def _refused(classes: list[type[Unread]], error: str) -> list[str]:
    """The names of the classes at which loading failed: those in PyTorch's message, or else the first that is
    not PyTorch's or Python's.
    """
    names = list(map(_name, classes))
    own = ("torch", "collections", "builtins", "__builtin__", "_codecs")
    return [name for name in names if name in error] or [
        name for name in names if name.partition(".")[0] not in own
    ][:1]


def _classes(file: IO[bytes]) -> list[type[Unread]]:
    """For each class and function that the file names, a stand-in; PyTorch takes its own first."""
    names = {}  # in the order of the file
    for entry in _globals(file):
        module, _, name = entry.partition(" ")
        names[module, name] = True
        # Python 2's names, which pickle's protocol 2 writes, are looked up under those of Python 3; PyTorch
        # knows some of them
        names[NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))] = True
    return [type(name, (Unread,), {"__module__": module, "__qualname__": name}) for module, name in names]


def _globals(file: IO[bytes]) -> Iterable[str]:
    """``"module name"`` of whatever the file's pickles refer to."""
    file.seek(0)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles: list[IO[bytes]] = [
                archive.open(name) for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"
            ]
            found = [operation for stream in pickles for operation in pickletools.genops(stream)]
    else:  # before PyTorch 1.6: a magic number, a version, facts of the system and the object, each a pickle
        file.seek(0)
        found = [operation for _ in range(4) for operation in pickletools.genops(file)]
    return [str(argument) for operation, argument, _ in found if operation.name == "GLOBAL"]


def state_dict_of(
    checkpoint: dict, path: str | Path, say: Callable[[str], object] = warnings.warn
) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or under the first of ``KEYS``. Raises WeightsError.

    ``say`` gets a line if there are several, or if the weights are averages over the training ("ema").
    """
    if _is_state_dict(checkpoint):
        return checkpoint
    found = [key for key in KEYS if _is_state_dict(checkpoint.get(key))]
    if not found:
        objects = [
            f"{key!r} is an object of class {_name(type(value))}"
            for key, value in checkpoint.items()
            if isinstance(value, Unread)
        ]
        held = f" ({', '.join(objects)})" if objects else ""
        raise WeightsError(
            f"{path}: no state dict in it, neither bare nor under {' or '.join(map(repr, KEYS))}{held}"
        )
    if len(found) > 1 or found[0] == "ema":
        others = f"; it has others under {' and '.join(map(repr, found[1:]))}" if found[1:] else ""
        say(f"{path}: took the weights under {found[0]!r}{others}")
    return checkpoint[found[0]]


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _fitted(state: dict[str, Tensor], wanted: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """``state`` under the names of the model, without what wrappers and profilers added."""
    fitted: dict[str, Tensor] = {}
    for given, value in state.items():
        name = str(given)
        while name not in wanted and name.partition(".")[0] in _WRAPPERS:
            name = name.partition(".")[2]
        if name not in wanted:  # a part of the network that was wrapped
            name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if name in fitted:
            raise WeightsError(f"{path}: holds {name} twice, the second time as {given}")
        if name in wanted or name.rpartition(".")[2] not in _COUNTERS:
            fitted[name] = value
    return fitted


def _list(names: list[str], others: list[str]) -> str:
    """The number of ``names``, the first of them, and the most similar name among ``others``."""
    nearest = difflib.get_close_matches(names[0], others, 1)
    meant = f", nearest on the other side {nearest[0]}" if nearest else ""
    return f"{len(names)} name{'s' if len(names) > 1 else ''} ({names[0]}{meant})"


def load_weights(model: nn.Module, path: str | Path, *, say: Callable[[str], object] = warnings.warn) -> dict:
    """Loads the weights in ``path`` into ``model``, every name and shape checked first, and returns the whole
    loaded dict.

    They may be bare or under one of ``KEYS``, as saved by DataParallel, DDP or ``torch.compile``, beside
    anything else: what is not plain comes as :class:`Unread`. ``say`` gets a line where one of several sets
    of weights was taken.

    Raises WeightsError with one line that says what does not fit: another layout, number of classes or size,
    numbers not finite.
    """
    checkpoint, wanted = read_checkpoint(path), model.state_dict()
    state = _fitted(state_dict_of(checkpoint, path, say), wanted, path)
    # files older than PyTorch 0.4.1 have no such counters
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        parts = [f"lacks {_list(missing, unknown)}"] if missing else []
        parts += [f"has {_list(unknown, missing)} that the model has not"] if unknown else []
        raise WeightsError(f"{path}: another layout than the model's: it {' and '.join(parts)}")
    for name, value in state.items():
        shape = wanted[name].shape
        if name in ("fc.weight", "fc.bias") and value.shape[1:] == shape[1:] and value.shape != shape:
            raise WeightsError(f"{path}: trained for {value.shape[0]} classes, wanted {shape[0]}")
        if value.shape != shape:
            raise WeightsError(f"{path}: {name} is {tuple(value.shape)}, the model wants {tuple(shape)}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite")
    model.load_state_dict({**{name: wanted[name] for name in wanted if name not in state}, **state})
    return checkpoint


def fingerprint(model: nn.Module) -> str:
    """The same for the same weights only, whatever file they lie in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        # needs no numpy
        digest.update(
            name.encode() + ctypes.string_at(value.data_ptr(), value.numel() * value.element_size())
        )
    return digest.hexdigest()
