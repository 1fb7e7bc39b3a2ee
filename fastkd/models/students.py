"""A trained network from the folder of its run, with the modules that its method has added."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.errors import one_line
from fastkd.models.weights import WeightsError, load_weights, read_checkpoint
from fastkd.seeds import seeded


def load_student(
    folder: str | Path, create: Callable[[str, int], nn.Module], *, file: str = "best.pt"
) -> nn.Module:
    """See :func:`fastkd.models.load_student`; ``create(name, classes)`` makes a network."""
    path = Path(folder).expanduser() / file
    checkpoint = read_checkpoint(path)
    try:
        about = checkpoint["config"]
        classes = about.get("classes") or len(checkpoint["model"]["fc.weight"])  # older runs say no number
        with seeded(0, "load_student"):  # leaves the random numbers of the caller alone
            network = create(about["identity"]["model"], classes)
            if about["trained"] not in ("teacher", "baseline"):
                # imported here: they lie on a higher floor, and importing fastkd does without them
                methods = importlib.import_module("fastkd.methods")
                network = methods.wrapped(network, create(about["teacher"], classes), about)
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
