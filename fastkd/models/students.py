"""A trained network from the folder of its run, with whatever its method has put into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.models.weights import WeightsError, load_weights, read_checkpoint
from fastkd.seeds import seeded

HOOKS: dict[str, Callable[[nn.Module, nn.Module, Mapping[str, Any]], nn.Module]] = {}
"""What lies above and is needed here. ``fastkd.methods`` sets "wrap": (student, teacher, the run's config.json) -> the student as its
method changes it."""


def load_student(folder: str | Path, create: Callable[[str, int], nn.Module], *, file: str = "best.pt") -> nn.Module:
    """See :func:`fastkd.models.load_student`; ``create(name, classes)`` makes a network."""
    path = Path(folder).expanduser() / file
    checkpoint = read_checkpoint(path)
    try:
        about, classes = checkpoint["config"], len(checkpoint["model"]["fc.weight"])
        with seeded(0, "load_student"):  # leaves the random numbers of the caller alone
            network = create(about["identity"]["model"], classes)
            if about["trained"] not in ("teacher", "baseline"):
                network = HOOKS["wrap"](network, create(about["teacher"], classes), about)
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise WeightsError(f"{path}: not the weights of a run of this version ({why})") from None
    load_weights(network, path)
    return network.eval()
