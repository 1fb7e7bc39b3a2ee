"""The options of methods: from command-line words or Python values to the fields of ``Options``."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

Nested = dict[str, dict[str, Any]]


def from_words(words: Iterable[str], sections: Mapping[str, type]) -> Nested:
    """``["at.beta=500"]`` as ``{"at": {"beta": "500"}}``. ``sections``: the dataclass behind each name before
    the point.

    A bare ``beta=500`` goes where one section alone has the field. Raises ValueError for a word that is no
    option, or one given twice.
    """
    found: Nested = {}
    for word in words:
        name, equals, value = word.partition("=")
        section, point, field = name.rpartition(".")
        if not equals or not field:
            raise ValueError(f"--option is {word!r}, wanted NAME.FIELD=VALUE")
        if not point:
            section = _owner(field, sections)
        if field in found.setdefault(section, {}):
            raise ValueError(f"--option {section}.{field} is given twice")
        found[section][field] = value
    return found


def _owner(field: str, sections: Mapping[str, type]) -> str:
    owners = [name for name, kind in sections.items() if field in names(kind)]
    if len(owners) != 1:
        known = [f"{name}.{field}" for name in owners] or _all(sections)
        what = "stands for several" if owners else "is not known"
        raise ValueError(f"option {field!r} {what}, wanted one of {', '.join(known)}")
    return owners[0]


def names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _all(sections: Mapping[str, type]) -> list[str]:
    return [f"{name}.{field}" for name, kind in sections.items() for field in names(kind)]


def filled(section: str, kind: Any, base: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """A ``kind``, a dataclass, with the values of ``base``, overridden by those of ``given``. Raises
    ValueError for an unknown field or a value that is not allowed.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = dict(base)
    for name, value in given.items():
        if name not in fields:
            known = ", ".join(f"{section}.{field}" for field in fields) or "none"
            raise ValueError(f"option {section}.{name} is not known, wanted one of {known}")
        values[name] = convert(f"{section}.{name}", hints[name], value, fields[name].metadata.get("choices"))
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"option {section}: {error}") from None


def convert(name: str, hint: Any, value: Any, choices: tuple[str, ...] | None = None) -> Any:
    """``value``, or what a string on the command line means, as the type ``hint``: 0.5:0.75 is a tuple,
    "none" is None where it may be.
    """
    several = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if several else (hint,)
    if type(None) in kinds and (value is None or value == "none"):
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    try:
        result = _CONVERT[typing.get_origin(kind) or kind](value)
    except (TypeError, ValueError):
        result = None
    if result is None or (choices and result not in choices):
        wanted = f"one of {', '.join(choices)}" if choices else _WANTED[typing.get_origin(kind) or kind]
        raise ValueError(f"option {name} is {value!r}, wanted {wanted}")
    return result


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, (tuple, list)):
        return ":".join(map(str, value))
    return "none" if value is None else str(value)


def _float(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _int(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError
    return int(value)


def _bool(value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return value if isinstance(value, bool) else known.get(str(value).lower())  # type: ignore[return-value]


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _tuple(value: Any) -> tuple[float, ...]:
    return tuple(_float(part) for part in (value.split(":") if isinstance(value, str) else value))


_CONVERT: dict[Any, Any] = {float: _float, int: _int, bool: _bool, str: _str, tuple: _tuple}
_WANTED = {
    float: "a number", int: "a whole number", bool: "true or false", str: "a word",
    tuple: "numbers with colons between them: 0.5:0.75",
}  # fmt: skip
