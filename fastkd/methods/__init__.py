"""Distillation methods. A new one is one file with its Term and one line in ``_METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastkd.methods.at import AT
from fastkd.methods.base import Method, Output, Term
from fastkd.methods.fsp import FSP
from fastkd.methods.kd import KD


class Shares(NamedTuple):
    """(cross-entropy, KD) as a preset's authors weigh them: in ``kd`` alone and beside AT. Without KD cross-entropy counts once."""

    alone: tuple[float, float]
    beside_at: tuple[float, float]
    at: str = ""  # whose AT and temperature, where the modules have no preset of this name
    fsp: str = ""  # whose FSP, where the authors have none


_SHARES = {
    "hankyul2": Shares((1, 1), (1, 0.9)),
    "zagoruyko": Shares((0.1, 0.9), (0.1, 0.9), fsp="repdistiller"),
    "repdistiller": Shares((0.1, 0.9), (1, 1)),  # -r 0.1 -a 0.9; with another loss its README sets -a 1 and leaves -r at 1
    "mdistiller": Shares((0.1, 0.9), (0.1, 0.9), fsp="repdistiller"),  # it never combines AT and KD: as in its KD
    "kdzoo": Shares((1, 0.1), (1, 0.1)),
    "torchdistill": Shares((0.9, 0.1), (0.9, 0.1)),
    "sakd": Shares((1, 0.9), (1, 0.9), at="repdistiller", fsp="repdistiller"),  # it has KD alone; its AT rows are others'
}


def _kd(preset: str) -> Method:
    shares = _shares(preset)
    ce, weight = shares.alone
    return Method(KD(shares.at or preset, weight=weight), ce=ce)


def _at_kd(preset: str) -> Method:
    shares = _shares(preset)
    ce, weight = shares.beside_at
    return Method(AT(shares.at or preset), KD(shares.at or preset, weight=weight), ce=ce)


def _shares(preset: str) -> Shares:
    if preset not in _SHARES:
        raise ValueError(f"KD has no preset {preset!r}, wanted one of {', '.join(_SHARES)}")
    return _SHARES[preset]


_PLAIN = Shares((1, 1), (1, 1))  # of a preset that has no KD

_METHODS: dict[str, Callable[[str], Method]] = {
    "baseline": lambda preset: Method(),
    "kd": _kd,
    "at": lambda preset: Method(AT(_SHARES.get(preset, _PLAIN).at or preset)),
    "fsp": lambda preset: Method(FSP(fsp_preset(preset))),
    "at+kd": _at_kd,
}

METHODS = tuple(_METHODS)
TWO_PHASES = ("fsp",)
"""Methods that some train in two phases: the distillation terms alone, which initialize the student, then cross-entropy alone."""


def fsp_preset(preset: str) -> str:
    """Whose FSP goes with ``preset``: RepDistiller's where its authors have none."""
    return _SHARES.get(preset, _PLAIN).fsp or preset


def create_method(name: str, preset: str = "hankyul2") -> Method:
    """The method ``name`` (one of ``METHODS``) with the coefficients of ``preset``. Raises ValueError for an unknown name or preset."""
    if name not in _METHODS:
        raise ValueError(f"method {name!r} is not known; known: {', '.join(METHODS)}")
    return _METHODS[name](preset)


__all__ = ["METHODS", "TWO_PHASES", "Method", "Output", "Term", "create_method", "fsp_preset"]
