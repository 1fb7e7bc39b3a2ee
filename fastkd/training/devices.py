"""The device of a run."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from fastkd.training import distributed
from fastkd.training.errors import UserError


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, or by itself a GPU if there is one. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; wanted cpu or cuda") from None
    if device.type == "cuda" and distributed.launched() is not None:
        device = torch.device("cuda", distributed.gpu_index())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees no such GPU here")
    return device


def can_compile(device: torch.device) -> bool:
    """Whether what ``torch.compile`` needs is there: Triton for a GPU, and a C++ compiler."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
