"""Distillation methods: one file here with a :class:`Distiller` is one method, under the file's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from fastkd import plugins
from fastkd.methods import definition
from fastkd.methods.base import (
    Batch,
    Beside,
    BuildContext,
    Distiller,
    Output,
    Points,
    Preset,
    option,
    overrides,
    union,
)
from fastkd.methods.context import undisturbed
from fastkd.methods.definition import Definition, Term
from fastkd.models.observed import views

# the order of the published table and of the terms of a sum, in which only KD is last; methods that are not
# in it follow by name
_TABLE = "kd dkd fitnet at fsp ofd rkd crd reviewkd srrl afd semckd simkd norm sakd".split()


def _kinds() -> dict[str, type[Distiller]]:
    """The method of each file in this folder that holds one."""
    found: dict[str, type[Distiller]] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, Distiller)
                and value.__module__ == module.__name__ != Distiller.__module__
            ):
                found[name] = value
    return _in_order(found)


def _in_order(found: Mapping[str, type[Distiller]]) -> dict[str, type[Distiller]]:
    order = [*filter(found.__contains__, _TABLE), *sorted(found.keys() - {*_TABLE})]
    return {name: found[name] for name in order}


_KINDS = _kinds()

METHODS = ("baseline", *_KINDS)
"""The names of the single methods; several are joined by "+"."""


def register(name: str) -> Callable[[type[Distiller]], type[Distiller]]:
    """A decorator that adds a :class:`Distiller` of your own as the method ``name``:

        @fastkd.methods.register("vector")
        class Vector(fastkd.methods.Distiller): ...

    Raises ValueError for a name that is taken, TypeError for a class that is not a complete Distiller. An
    entry point of the group "fastkd.methods" does the same.
    """

    def add(kind: type[Distiller]) -> type[Distiller]:
        _register(name, kind)
        return kind

    return add


def _register(name: str, kind: Any, package: str = "") -> None:
    global METHODS
    if not isinstance(kind, type) or not issubclass(kind, Distiller):
        raise TypeError(f"method {name!r} is {kind!r}, wanted a subclass of fastkd.methods.Distiller")
    lacking = [part for part in ("title", "presets", "canonical") if not hasattr(kind, part)]
    if lacking or kind.canonical not in kind.presets:
        wanted = f"a field {lacking[0]!r}" if lacking else f"its preset {kind.canonical!r} among its presets"
        raise TypeError(f"method {name!r} is {kind.__name__}, wanted {wanted}")
    if "+" in name or name in ("ce", "baseline"):
        raise ValueError(f"method name is {name!r}, wanted another one")
    plugins.register("method", _KINDS, name, kind, package)
    ordered = _in_order(_KINDS)
    _KINDS.clear()
    _KINDS.update(ordered)
    METHODS = ("baseline", *_KINDS)


def _found(name: str) -> dict[str, type[Distiller]]:
    """All methods, those of installed packages that ``name`` asks for among them."""
    for part in name.split("+") if name != "baseline" else ():
        plugins.find("method", _KINDS, part, _register)
    return _KINDS


def define(
    name: str,
    *,
    preset: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    words: Iterable[str] = (),
) -> Definition:
    """What the method ``name`` is: a name of ``METHODS``, or several with "+" between them.

    ``preset``: whose published values the terms take, such as "repdistiller"; None: those of the first term's
    best known code. ``options``: ``{"at": {"beta": 500}}``; ``words``: the same as the command line has it,
    ``["at.beta=500"]``. A term's own preset is the option ``preset``, and ``ce.weight`` the weight of
    cross-entropy. Raises ValueError for a name, a preset or an option that is not known, and where terms of a
    sum are published with different values of what they share; TypeError for a name that is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"method is {name!r}, wanted a name")
    return definition.define(_found(name), name, preset, options, words)


def definition_of(
    method: str | Definition, preset: str | None, options: Mapping[str, Mapping[str, Any]] | None
) -> Definition:
    """``method`` itself if it is a :class:`Definition`, else :func:`define` of that name.

    Raises TypeError for anything else, and ValueError for a preset or options beside a Definition, which has
    its own.
    """
    if isinstance(method, str):
        return define(method, preset=preset, options=options)
    if not isinstance(method, Definition):
        raise TypeError(f"method is {method!r}, wanted a name, or what fastkd.methods.define returns")
    for name, value in (("preset", preset), ("options", options)):
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but method is a Definition: give {name} to define")
    return method


def full_name(name: str) -> str:
    """A method's name with the terms of a sum in their order. Raises ValueError for one that is not known."""
    return "+".join(definition.names_of(_found(name), name)) or "baseline"


def create_method(
    name: str,
    context: BuildContext,
    *,
    preset: str | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Distiller | nn.ModuleDict:
    """The :class:`Distiller` ``name`` built for the networks of ``context``; of a sum a ModuleDict of its
    distillers by name.

    Arguments as for :func:`define`. Raises ValueError, and what a method raises for unfit networks.
    """
    distillers, _ = define(name, preset=preset, options=options).build(context, seed)
    return distillers[name] if name in distillers else nn.ModuleDict(distillers)


def wrapped(student: nn.Module, teacher: nn.Module, run: Mapping[str, Any]) -> nn.Module:
    """The student as the method of a run changes it; ``run`` is the run's config.json."""
    found = define(run["method"], preset=run["fields"]["preset"], words=run["options"])
    if not found.wraps:
        return student
    points, sides = run.get("points", (None, None)), run.get("sides", (32, 32))  # older runs have neither
    shapes = (3, sides[0], sides[0]), (3, sides[1], sides[1])
    with undisturbed(student, teacher):
        observed = views((student, teacher), tuple(points), None, shapes)
    context = BuildContext.of(student, teacher, shapes[0], observed, teacher_image_shape=shapes[1])
    return found.wrap(context)


def title_of(name: str) -> str:
    """A method's name for people: "AT+KD" for "at+kd"."""
    return "+".join(_KINDS[part].title if part in _KINDS else part for part in name.split("+"))


def colour_of(name: str) -> str | None:
    """The colour of a single method in figures; None for a sum."""
    return _KINDS[name].colour if name in _KINDS else None


__all__ = [
    "METHODS", "Batch", "Beside", "BuildContext", "Definition", "Distiller", "Output", "Points", "Preset",
    "Term", "colour_of", "create_method", "define", "definition", "definition_of", "full_name",
    "option", "overrides", "register", "title_of", "undisturbed", "union",
]  # fmt: skip
