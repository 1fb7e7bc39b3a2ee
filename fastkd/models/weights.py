"""Reading published weights: a bare state dict, or one under "model"."""

from __future__ import annotations

import ctypes
import hashlib
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class WeightsError(ValueError):
    """A file that does not hold weights for this model; the message is one line for the user."""


def read_checkpoint(path: str | Path) -> dict:
    """The dict in ``path``, on the CPU. Loaded with ``weights_only=True``: a file never runs code. Raises WeightsError."""
    try:
        file = open(os.path.expanduser(path), "rb")  # noqa: SIM115 - apart from the reading, whose OSErrors mean a damaged file
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds, with messages of many lines
        raise WeightsError(f"{path}: not a checkpoint of plain tensors, or truncated ({type(error).__name__})") from None
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, wanted a state dict or a dict with one under 'model'")
    return loaded


def state_dict_of(checkpoint: dict, path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint: itself, or its "model"; DataParallel's leading ``module.`` is dropped. Raises WeightsError."""
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path}: no state dict in it, neither bare nor under 'model'")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: str | Path) -> dict:
    """Loads the weights in ``path`` into ``model``, every name and shape checked first, and returns the whole loaded dict.

    Raises WeightsError with one line that says what does not fit: another layout, number of classes or size, numbers not finite.
    """
    checkpoint = read_checkpoint(path)
    state, wanted = state_dict_of(checkpoint, path), model.state_dict()
    # files older than PyTorch 0.4.1 have no such counters
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    if missing or unknown:
        parts = [f"lacks {len(missing)} name{'s' * (len(missing) > 1)} ({missing[0]}, ...)"] if missing else []
        parts += [f"has {len(unknown)} other{'s' * (len(unknown) > 1)} ({unknown[0]}, ...)"] if unknown else []
        raise WeightsError(f"{path}: another layout than the model's: it {' and '.join(parts)}")
    if state["fc.bias"].shape != wanted["fc.bias"].shape:
        raise WeightsError(f"{path}: trained for {state['fc.bias'].numel()} classes, wanted {wanted['fc.bias'].numel()}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise WeightsError(f"{path}: {name} is {tuple(value.shape)}, the model wants {tuple(wanted[name].shape)}")
        if not torch.isfinite(value).all():
            raise WeightsError(f"{path}: {name} holds numbers that are not finite")
    model.load_state_dict({**{name: wanted[name] for name in wanted if name not in state}, **state})
    return checkpoint


def fingerprint(model: nn.Module) -> str:
    """The same for the same weights only, whatever file they lie in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        digest.update(name.encode() + ctypes.string_at(value.data_ptr(), value.numel() * value.element_size()))  # needs no numpy
    return digest.hexdigest()
