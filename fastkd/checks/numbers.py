"""Numbers and choices among the arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def explain(check: Callable[..., object], *args: object) -> None:
    """Raise what ``check`` finds wrong with a call's arguments, in place of the error that is handled now;
    nothing if they are right.

    The error is in no local variable: one that holds its own frame would keep the features alive until a
    garbage collection.
    """
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        raise error from None


def switch(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(map(repr, known))}")


def number(name: str, value: object, *, at_least: float | None = None) -> float:
    """A finite number of Python or NumPy, as a float.

    Tensors are refused: a Parameter that is given as a number would silently get no gradient.
    """
    if isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name} is a tensor ({kind}), wanted a number: a tensor would get no gradient")
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or _from_numpy(value)):
        kind = type(value).__name__
        given = f"{value!r} ({kind})" if isinstance(value, (bool, str, complex)) else kind
        raise TypeError(f"{name} is {given}, wanted a number")
    result = float(value)  # type: ignore[arg-type]
    if known_to_graph(value):
        return result
    # by comparison, not math.isfinite: under torch.compile(dynamic=True) the number may be symbolic
    if not (-math.inf if at_least is None else at_least) <= result < math.inf or result == -math.inf:
        bound = "" if at_least is None else f" of at least {at_least:g}"
        raise ValueError(f"{name} is {value!r}, wanted a finite number{bound}")
    return result


def whole(value: object) -> bool:
    """Whether ``value`` is an integer of Python or NumPy. Booleans and tensors are not."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    if isinstance(value, Tensor) or type(value).__name__ in ("bool", "bool_"):  # NumPy's
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _from_numpy(value: object) -> bool:
    """Whether ``value`` is a NumPy number: known by names of its type, since NumPy may not be installed."""
    kind = type(value)
    if kind.__module__ != "numpy":
        return False
    if torch.compiler.is_compiling():  # which takes NumPy's numbers for arrays without dimensions
        x = torch.as_tensor(value)
        return x.dim() == 0 and x.dtype != torch.bool and not x.is_complex()
    return kind.__name__.startswith(("float", "int", "uint"))


def known_to_graph(value: object) -> bool:
    """Whether ``value`` is an input of the graph being compiled, as NumPy numbers are: known only later."""
    return torch.compiler.is_compiling() and _from_numpy(value)


_LEAST = {"p": 1.0, "eps": 0.0}
_NUMBERS = ("eps", "weight", "distance_weight", "angle_weight")


def constant(name: str, value: object) -> float:
    """As :func:`number`, for an operator's argument, a constant of a graph. NumPy's would be an input."""
    if known_to_graph(value):
        raise TypeError(
            f"{name} is a NumPy number, which the graph of a backend asked for by name cannot hold: wanted"
            f" float({name})"
        )
    return number(name, value, at_least=_LEAST.get(name))


def are_floats(a: object, b: object) -> bool:
    """Whether both are finite and of type float, which needs no further check. False if the sum overflows."""
    return type(a) is type(b) is float and 0.0 * (a + b) == 0.0


def above_zero(name: str, value: object) -> float:
    result = number(name, value)
    if not known_to_graph(value) and not result > 0:
        raise ValueError(f"{name} is {value!r}, wanted a finite number above 0")
    return result


def channels_stand(channel_dim: object) -> None:
    """Refuses all but the integers 1 and -1: True equals 1, but whoever gives it means channels last, -1."""
    if not whole(channel_dim) or channel_dim not in (1, -1):
        raise ValueError(f"channel_dim is {channel_dim!r}, wanted 1 or, for the last dimension, -1")


def option(name: str, value: Any) -> Any:
    """The value that a module stores for the argument ``name``: numbers as floats, anything else as given.

    A float attribute that changes becomes an input of a compiled graph. For each new value of an integer
    attribute the graph would be compiled again.
    """
    if name == "weights":
        return stage_weights(value)
    if name in ("temperature", "T"):
        return above_zero(name, value)
    if name == "p":
        return power(value)
    if name == "channel_dim":
        channels_stand(value)
    return number(name, value, at_least=_LEAST.get(name)) if name in _NUMBERS else value


def power(p: object) -> float:
    """The power of an attention map. Published ones are 1 to 4; |x|^p soon overflows float32 after 16."""
    result = number("p", p, at_least=1)
    if not known_to_graph(p) and result > 16:
        raise ValueError(
            f"p is {p!r}, wanted a power from 1 to 16; if it is the loss's factor, write weight={p!r}"
        )
    return result


def stage_weights(
    weights: object,
    count: int | None = None,
    what: str = "stage",
    convert: Callable[[str, object], float] = number,
) -> list[float] | None:
    """One number per stage or pair, as floats; None stays None."""
    if weights is None:
        return None
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        wanted = "numbers" if count is None else f"{count} numbers"
        raise TypeError(f"weights is {type(weights).__name__}, wanted a sequence of {wanted}, one a {what}")
    if count is not None and len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers, wanted {count}, one a {what}")
    return [convert(f"weights[{i}]", value) for i, value in enumerate(weights)]
