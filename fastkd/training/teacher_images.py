"""How each teacher's images are normalized, where that is not as the student's are."""

from __future__ import annotations

from typing import Any

from fastkd.data.feed import AnyDataset
from fastkd.errors import UserError
from fastkd.io.console import counted
from fastkd.models.normalization import Normalization
from fastkd.training.recipes import NORMALIZATIONS, normalization_of

RECORD = "images_normalized"
"""The key in a run's config for the normalization of its images, in the form of :func:`written`."""
SAME = "data"
"""The value of ``--teacher-normalization`` for a teacher that gets the student's images unchanged."""
FORM = f"{SAME}, or MEAN/STD of each channel: 0.5,0.5,0.5/0.5,0.5,0.5"


def parsed(text: str) -> Normalization | None:
    """(mean, std) of "0.5,0.5,0.5/0.5,0.5,0.5" or "0.5/0.5"; None for ``SAME``. Raises ValueError."""
    if text == SAME:
        return None
    try:
        mean, std = (tuple(float(part) for part in side.split(",")) for side in text.split("/"))
    except ValueError:
        mean, std = (), ()
    finite = all(abs(x) < float("inf") for x in (*mean, *std))
    if {len(mean), len(std)} - {1, 3} or not finite or min(std) <= 0:
        raise ValueError(f"{text!r}, wanted {FORM}, each deviation above 0")
    return tuple(mean * (4 - len(mean)))[:3], tuple(std * (4 - len(std)))[:3]


def written(normalization: Normalization | None) -> str:
    """What :func:`parsed` reads as these very numbers."""
    if normalization is None:
        return SAME
    return "/".join(",".join(repr(float(x)) for x in side) for side in normalization)


def in_words(normalization: Normalization) -> str:
    mean, std = (" ".join(f"{x:g}" for x in part) for part in normalization)
    return f"mean {mean}, deviation {std}"


def recorded(config: dict[str, Any], data: AnyDataset) -> Normalization | None:
    """(mean, std) of the images with which a run of fastkd trained these weights; None where its ``config``
    does not say so, as that of an older run on another data set.
    """
    if isinstance(config.get(RECORD), str):
        try:
            return parsed(config[RECORD])
        except ValueError:  # edited by hand
            pass
    name, dataset = identity_of(config).get("normalization"), identity_of(config).get("dataset")
    if dataset == data.name and isinstance(name, str):
        return normalization_of(name, data)
    return NORMALIZATIONS.get((str(name), str(dataset)))


def identity_of(config: Any) -> dict[str, Any]:
    """The identity in the config of a checkpoint; {} for a checkpoint of no run, whatever stands there."""
    identity = config.get("identity") if isinstance(config, dict) else None
    return identity if isinstance(identity, dict) else {}


def for_each(flag: str, given: tuple[Any, ...], teachers: int) -> list[Any]:
    """The values of a flag, one per teacher; a single value is for all of them. Raises UserError."""
    if len(given) not in (1, teachers):
        raise UserError(
            f"{flag} is given {counted(len(given), 'time')}, and there are {counted(teachers, 'teacher')}:"
            " wanted it once, for all of them, or once for each"
        )
    return [*given] * (teachers if len(given) == 1 else 1)
