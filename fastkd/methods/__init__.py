"""Distillation methods. A new one is one file with its Term and one line in ``_METHODS``."""

from __future__ import annotations

from collections.abc import Callable

from fastkd.methods.at import AT
from fastkd.methods.base import Method, Output, Term
from fastkd.methods.fsp import FSP
from fastkd.methods.kd import KD

_METHODS: dict[str, Callable[[str], Method]] = {
    "baseline": lambda preset: Method(),
    "kd": lambda preset: Method(KD(preset)),
    "at": lambda preset: Method(AT(preset)),
    "fsp": lambda preset: Method(FSP(preset)),
    "at+kd": lambda preset: Method(AT(preset), KD(preset, weight=0.9)),  # 0.9 in hankyul2's at_st, though its st alone has 1
}

METHODS = tuple(_METHODS)


def create_method(name: str, preset: str = "hankyul2") -> Method:
    """The method ``name`` (one of ``METHODS``) with the coefficients of ``preset``. Raises ValueError for an unknown name or preset."""
    if name not in _METHODS:
        raise ValueError(f"method {name!r} is not known; known: {', '.join(METHODS)}")
    return _METHODS[name](preset)


__all__ = ["METHODS", "Method", "Output", "Term", "create_method"]
