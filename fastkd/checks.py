"""Argument checks: misuse gets one sentence with the argument's name, what was given and what was wanted.

Floor 0: used by the reference before it computes, and by the operations to explain a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import errors

Features = Tensor | Sequence[Tensor] | Mapping[Any, Tensor] | Iterable[Tensor]
"""One feature, or those of several stages in their order."""

CHANNEL_REDUCE = ("mean", "sum")
EPS_MODE = ("clamp", "add")
POOL = ("before", "after")
POOL_MODE = ("avg", "max")
DIFFERENCE = ("squared", "l2")
REDUCE = ("sum", "mean")
DISTANCE = ("squared", "frobenius", "column_l2")
PRECISION = ("ieee", "tf32", "tf32x3", None)
ACTIVATION = ("softmax", "sigmoid")
KD_REDUCTION = ("batchmean", "mean", "sum", "none")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def switch(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(map(repr, known))}")


def number(name: str, value: object, *, at_least: float | None = None) -> float:
    """A finite number, of Python's or NumPy's, as a float.

    A tensor is none: a number has no gradient, and a Parameter would lose its own without a word.
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


def _from_numpy(value: object) -> bool:
    """Whether it is one of NumPy's numbers; told by names, since NumPy need not be there."""
    kind = type(value)
    if kind.__module__ != "numpy":
        return False
    if torch.compiler.is_compiling():  # which takes NumPy's numbers for arrays without dimensions
        x = torch.as_tensor(value)
        return x.dim() == 0 and x.dtype != torch.bool and not x.is_complex()
    return kind.__name__.startswith(("float", "int", "uint"))


def known_to_graph(value: object) -> bool:
    """Whether it is an input of the graph that is compiled, as NumPy's numbers are, and known only later."""
    return torch.compiler.is_compiling() and _from_numpy(value)


_LEAST = {"p": 1.0, "eps": 0.0}


def constant(name: str, value: object) -> float:
    """As :func:`number`, for an operator's argument: a constant of a compiled graph, NumPy's an input."""
    if known_to_graph(value):
        raise TypeError(
            f"{name} is a NumPy number, which the graph of a backend asked for by name cannot hold: wanted"
            f" float({name})"
        )
    return number(name, value, at_least=_LEAST.get(name))


def are_floats(a: object, b: object = 0.0, c: object = 0.0) -> bool:
    """Whether all are finite and of type float, so that none needs a look; not if the sum overflows."""
    return type(a) is type(b) is type(c) is float and 0.0 * (a + b + c) == 0.0


def above_zero(name: str, value: object) -> float:
    result = number(name, value)
    if not known_to_graph(value) and not result > 0:
        raise ValueError(f"{name} is {value!r}, wanted a finite number above 0")
    return result


def option(name: str, value: Any) -> Any:
    """What a module holds of the argument ``name``: numbers as floats, anything else as it was given.

    A float attribute that changes becomes an input of a compiled graph; for an integer it is compiled anew
    each time.
    """
    if name == "weights":
        return stage_weights(value)
    if name in ("temperature", "T"):
        return above_zero(name, value)
    if name == "p":
        return power(value)
    return number(name, value, at_least=_LEAST.get(name)) if name in ("eps", "weight") else value


def power(p: object) -> float:
    """The power of an attention map. Published ones are 1 to 4; |x|^p soon overflows float32 after 16."""
    result = number("p", p, at_least=1)
    if not known_to_graph(p) and result > 16:
        raise ValueError(
            f"p is {p!r}, wanted a power from 1 to 16; if it is the loss's factor, write weight={p!r}"
        )
    return result


def feature(name: str, x: object, *, spatial: bool = True) -> None:
    """A floating-point (N, C, *S) tensor, one to three spatial dimensions, none empty; else (N, *S)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
    lowest, form = (3, "(N, C, *S)") if spatial else (2, "a map (N, *S)")
    if not lowest <= x.dim() <= lowest + 2:
        raise ValueError(
            f"{name} is {describe(x)}, wanted {form} with one to three spatial dimensions, {lowest} to"
            f" {lowest + 2} in all"
        )
    for size, what in zip(
        x.shape, ("an empty batch", "zero channels") if spatial else ("an empty batch",), strict=False
    ):
        if size == 0:
            raise ValueError(f"{name} is {describe(x)}: {what}, wanted at least one")
    if 0 in x.shape:
        raise ValueError(f"{name} is {describe(x)}: zero positions, wanted at least one")


def listed(value: Any) -> Any:
    """``value``, or a list of what it holds: the values of a dict of features, the items of a generator, each
    in its order.
    """
    # in the order of their cost: these three are what nearly every call brings
    if type(value) is list or type(value) is tuple or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return list(value)
    return value


def stages(name: str, value: object) -> list[Tensor]:
    """The tensors of one stage or of several; a lone tensor is a list of one."""
    if type(value) is list:  # what nearly every call brings
        return value
    if isinstance(value, Tensor):
        return [value]
    value = listed(value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is {type(value).__name__}, wanted a tensor or a sequence of tensors")
    return list(value)


def same_batch(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: batch sizes differ, wanted the same"
        )
    if x.device != other.device:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: devices differ, wanted the same"
        )


def same_rank(name: str, x: Tensor, other_name: str, other: Tensor, given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: {given} and {wanted} spatial"
            " dimensions, wanted the same number"
        )


def fits(
    name: str,
    i: int,
    x: Tensor,
    size: Sequence[int],
    other_name: str,
    other: Tensor,
    other_size: Sequence[int],
) -> None:
    if any(have > want for have, want in zip(size, other_size, strict=True)):
        raise ValueError(
            f"{name}[{i}] is a map {describe(x)}, {other_name}[{i}] is {describe(other)}: "
            f"a normalized map cannot be pooled, wanted one no larger than the {other_name}'s"
        )


def stage_weights(
    weights: object,
    count: int | None = None,
    what: str = "stage",
    convert: Callable[[str, object], float] = number,
) -> list[float] | None:
    """One number a stage or pair, as floats; None stays."""
    if weights is None:
        return None
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        wanted = "numbers" if count is None else f"{count} numbers"
        raise TypeError(f"weights is {type(weights).__name__}, wanted a sequence of {wanted}, one a {what}")
    if count is not None and len(weights) != count:
        raise ValueError(f"weights has {len(weights)} numbers, wanted {count}, one a {what}")
    return [convert(f"weights[{i}]", value) for i, value in enumerate(weights)]


def _named(name: str, tensors: list[Tensor], value: object) -> list[str]:
    return [name] if isinstance(value, Tensor) else [f"{name}[{i}]" for i in range(len(tensors))]


def _pairs_up(
    student: object,
    teacher: object,
    *,
    least: int,
    spatial_student: bool = True,
    spatial_teacher: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    students, teachers = stages("student", student), stages("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(
            f"student has {len(students)} stages, teacher has {len(teachers)}: wanted the same number"
        )
    if len(students) < least:
        raise ValueError(f"student has {len(students)} stages, wanted at least {least}")
    s_names, t_names = _named("student", students, student), _named("teacher", teachers, teacher)
    for s_name, t_name, s, t in zip(s_names, t_names, students, teachers, strict=True):
        feature(s_name, s, spatial=spatial_student)
        feature(t_name, t, spatial=spatial_teacher)
        same_batch(s_name, s, t_name, t)
        same_batch(s_name, s, s_names[0], students[0])
    return students, teachers


def attention_map(x: object, p: object, channel_reduce: object, eps: object, eps_mode: object) -> None:
    feature("x", x)
    power(p)
    number("eps", eps, at_least=0)
    switch("channel_reduce", channel_reduce, CHANNEL_REDUCE)
    switch("eps_mode", eps_mode, EPS_MODE)


def relu_tap(
    x: object, residual: object, p: object, channel_reduce: object, eps: object, eps_mode: object
) -> None:
    attention_map(x, p, channel_reduce, eps, eps_mode)
    assert isinstance(x, Tensor)
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual is {type(residual).__name__}, wanted a tensor or None")
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual is {describe(residual)}, x is {describe(x)}: dtypes differ, wanted the same"
        )
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"residual is {describe(residual)}, x is {describe(x)}: wanted the same shape and device"
        )


def attention_options(
    p: object,
    channel_reduce: object,
    eps: object,
    eps_mode: object,
    pool: object,
    pool_mode: object,
    difference: object,
    stage_reduce: object,
    weight: object,
) -> None:
    power(p)
    number("eps", eps, at_least=0)
    number("weight", weight)
    switch("channel_reduce", channel_reduce, CHANNEL_REDUCE)
    switch("eps_mode", eps_mode, EPS_MODE)
    switch("pool", pool, POOL)
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("difference", difference, DIFFERENCE)
    switch("stage_reduce", stage_reduce, REDUCE)


def attention_transfer(
    student: object,
    teacher: object,
    p: object,
    channel_reduce: object,
    eps: object,
    eps_mode: object,
    pool: object,
    pool_mode: object,
    difference: object,
    stage_reduce: object,
    weights: object,
    weight: object,
    teacher_is_map: bool,
    student_is_map: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    attention_options(p, channel_reduce, eps, eps_mode, pool, pool_mode, difference, stage_reduce, weight)
    students, teachers = _pairs_up(
        student, teacher, least=1, spatial_student=not student_is_map, spatial_teacher=not teacher_is_map
    )
    stage_weights(weights, len(students), "stage")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s_size, t_size = s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :]
        same_rank(f"student[{i}]", s, f"teacher[{i}]", t, len(s_size), len(t_size))
        if student_is_map:
            fits("student", i, s, s_size, "teacher", t, t_size)
        if teacher_is_map:
            fits("teacher", i, t, t_size, "student", s, s_size)
    return students, teachers


def one_position(
    students: Sequence[Tensor], teachers: Sequence[Tensor], teacher_is_map: bool, student_is_map: bool
) -> None:
    """Warns of stages whose maps have one position after pooling: such a map is a constant."""
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s_size, t_size = s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :]
        if all(min(a, b) == 1 for a, b in zip(s_size, t_size, strict=True)):
            errors.warn_once(
                f"attention_transfer_loss: student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: a"
                " normalized map of one position is constant, so this stage's loss teaches nothing; wanted a"
                " stage before the pooling"
            )


def tokens(
    operation: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    teacher_is_map: bool = False,
    student_is_map: bool = False,
) -> None:
    """Warns of what looks like tokens (N, L, C) of a square grid, where a loss takes it for (N, C, L)."""
    if torch.compiler.is_compiling():
        return
    for name, features, is_map in (
        ("student", students, student_is_map),
        ("teacher", teachers, teacher_is_map),
    ):
        for i, x in enumerate(() if is_map else features):
            side = math.isqrt(x.shape[1]) if x.dim() == 3 else 0
            # tokens as a transformer makes them; a view of them with the channels first is none
            if side >= 4 and x.shape[1] - side * side in (0, 1) and x.shape[2] >= 64 and x.stride(2) == 1:
                errors.warn_once(
                    f"{operation}: {name}[{i}] is {describe(x)}, taken for {x.shape[1]} channels at"
                    f" {x.shape[2]} positions; if these are tokens (N, L, C) of a {side}x{side} grid, wanted"
                    " them as maps, by fastkd.tokens_to_map",
                    key=f"tokens {operation}",
                )
                return


def sakd_map(x: object, name: str = "x") -> None:
    feature(name, x)
    assert isinstance(x, Tensor)
    if x.dim() != 4 or x.shape[2] != x.shape[3]:
        raise ValueError(f"{name} is {describe(x)}, wanted a square map (N, C, H, H)")


def sakd_loss(
    student: object, teacher: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    number("weight", weight)
    students, teachers = _pairs_up(student, teacher, least=1)
    stage_weights(weights, len(students), "stage")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        sakd_map(s, f"student[{i}]")
        sakd_map(t, f"teacher[{i}]")
        if s.shape[2] != t.shape[2]:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: sizes differ, SAKD wanted the"
                " same H"
            )
    return students, teachers


def fsp_matrix(a: object, b: object, pool_mode: object, precision: object) -> None:
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("precision", precision, PRECISION)
    feature("a", a)
    feature("b", b)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    same_batch("a", a, "b", b)
    same_rank("a", a, "b", b, a.dim() - 2, b.dim() - 2)


def fsp_loss(
    student: object,
    teacher: object,
    pool_mode: object,
    distance: object,
    pair_reduce: object,
    weights: object,
    weight: object,
    precision: object,
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    switch("pool_mode", pool_mode, POOL_MODE)
    switch("distance", distance, DISTANCE)
    switch("pair_reduce", pair_reduce, REDUCE)
    switch("precision", precision, PRECISION)
    number("weight", weight)
    students, teachers = _pairs_up(student, teacher, least=2)
    stage_weights(weights, len(students) - 1, "pair")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: channels differ, FSP wanted"
                " the same number"
            )
    for name, chain in (("student", students), ("teacher", teachers)):
        for i in range(1, len(chain)):
            same_rank(
                f"{name}[{i - 1}]",
                chain[i - 1],
                f"{name}[{i}]",
                chain[i],
                chain[i - 1].dim() - 2,
                chain[i].dim() - 2,
            )
    return students, teachers


def kd_loss(
    student_logits: object,
    teacher_logits: object,
    temperature: object,
    reduction: object,
    weight: object,
    activation: object = "softmax",
    mask: object = None,
) -> None:
    switch("reduction", reduction, KD_REDUCTION)
    switch("activation", activation, ACTIVATION)
    number("weight", weight)
    above_zero("temperature", temperature)
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
        if x.dim() not in (2, 2 if mask is None else 3) or 0 in x.shape:
            form = "(N, K)" if mask is None else "(N, K) or (N, L, K)"
            raise ValueError(f"{name} is {describe(x)}, wanted {form} with at least one sample and one class")
        if x.shape[-1] == 1 and activation == "softmax":
            raise ValueError(
                f"{name} is {describe(x)}: the softmax over one class is 1 and teaches nothing, "
                "wanted at least two (of one logit z, the two are z and 0), or activation='sigmoid'"
            )
    assert isinstance(student_logits, Tensor) and isinstance(teacher_logits, Tensor)
    same_batch("student_logits", student_logits, "teacher_logits", teacher_logits)
    if student_logits.shape[1:] != teacher_logits.shape[1:]:
        what = "class counts" if student_logits.dim() == teacher_logits.dim() == 2 else "shapes"
        raise ValueError(
            f"student_logits is {describe(student_logits)}, teacher_logits is {describe(teacher_logits)}: "
            f"{what} differ, wanted the same"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {given}, wanted a tensor of bool")
    if mask.shape != student_logits.shape[:-1] or mask.device != student_logits.device:
        raise ValueError(
            f"mask is {describe(mask)}, student_logits is {describe(student_logits)}: wanted its shape"
            " without the classes, on its device"
        )


def rkd_loss(
    student: object, teacher: object, distance_weight: object, angle_weight: object, weight: object
) -> None:
    for name, value in (
        ("distance_weight", distance_weight),
        ("angle_weight", angle_weight),
        ("weight", weight),
    ):
        number(name, value)
    for name, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(f"{name} is {describe(x)}, wanted (N, ...) with at least one number a sample")
        if x.shape[0] == 1:
            raise ValueError(f"{name} is {describe(x)}: one sample has no relations, wanted at least two")
    assert isinstance(student, Tensor) and isinstance(teacher, Tensor)
    same_batch("student", student, "teacher", teacher)


def crd_loss(
    student: object,
    teacher: object,
    student_bank: object,
    teacher_bank: object,
    rows: object,
    temperature: object,
    normalizers: object,
    eps: object,
    weight: object,
) -> None:
    """All but the values in ``rows``: see :func:`crd_rows`."""
    number("weight", weight)
    number("eps", eps, at_least=0)
    coldness = above_zero("temperature", temperature)
    pairs = (
        {"student": student, "teacher": teacher},
        {"student_bank": student_bank, "teacher_bank": teacher_bank},
    )
    for pair, form in zip(pairs, ("(N, D)", "(M, D)"), strict=True):
        _matrices(pair, form)
    assert isinstance(student, Tensor) and isinstance(student_bank, Tensor)
    if student.shape[1] != student_bank.shape[1] or student.device != student_bank.device:
        raise ValueError(
            f"student is {describe(student)}, student_bank is {describe(student_bank)}: wanted the same width"
            " and device"
        )
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows is {type(rows).__name__}, wanted a tensor")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows is {describe(rows)}, wanted int64")
    if (
        rows.dim() != 2
        or rows.shape[0] != student.shape[0]
        or rows.shape[1] < 2
        or rows.device != student.device
    ):
        raise ValueError(
            f"rows is {describe(rows)}, wanted ({student.shape[0]}, K + 1) on {student.device} with a"
            " positive and a negative at least"
        )
    _normalizers(normalizers, student.device)
    double = any(
        isinstance(x, Tensor) and x.dtype == torch.float64
        for x in (student, teacher, student_bank, teacher_bank, normalizers)
    )
    least = 1 / math.log(torch.finfo(torch.float64 if double else torch.float32).max / student_bank.shape[0])
    if not known_to_graph(temperature) and coldness < least:
        raise ValueError(
            f"temperature is {temperature!r}, wanted at least {least:.4f}: exp(1 / temperature) times the"
            " bank's rows overflows"
        )


def crd_rows(rows: Tensor, size: int, name: str = "rows") -> None:
    """That ``rows`` are rows of a bank of so many. On a GPU, PyTorch's own assertion fails instead."""
    if rows.device.type == "cpu" and rows.numel():
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= size:
            raise ValueError(
                f"{name} has {least if least < 0 else most}, wanted rows 0 to {size - 1} of the bank"
            )


def crd_banks(student_bank: object, teacher_bank: object, normalizers: object) -> None:
    _matrices({"student_bank": student_bank, "teacher_bank": teacher_bank}, "(M, D)")
    assert isinstance(student_bank, Tensor)
    _normalizers(normalizers, student_bank.device)


def _matrices(pair: Mapping[str, object], form: str) -> None:
    """Two floating-point matrices of one shape on one device."""
    for name, x in pair.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
        if x.dim() != 2 or 0 in x.shape:
            raise ValueError(
                f"{name} is {describe(x)}, wanted {form} with at least one row and one number in it"
            )
    (name, x), (other_name, other) = pair.items()
    assert isinstance(x, Tensor) and isinstance(other, Tensor)
    if x.shape != other.shape or x.device != other.device:
        raise ValueError(
            f"{name} is {describe(x)}, {other_name} is {describe(other)}: wanted the same shape and device"
        )


def _normalizers(value: object, device: torch.device) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise TypeError(
                f"normalizers is {type(value).__name__}, wanted a tensor (2,), two numbers or None"
            )
        if len(value) != 2:
            raise ValueError(f"normalizers has {len(value)} numbers, wanted two")
        for i, each in enumerate(value):
            number(f"normalizers[{i}]", each)
        return
    if value.dtype not in _FLOATS:
        raise TypeError(f"normalizers is {describe(value)}, wanted float16, bfloat16, float32 or float64")
    if value.shape != (2,) or value.device != device:
        raise ValueError(f"normalizers is {describe(value)}, wanted two numbers (2,) on {device}")


def ofd_margin(weight: object, bias: object) -> None:
    for name, x in (("weight", weight), ("bias", bias)):
        _channels(name, x)
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    if weight.shape != bias.shape or weight.device != bias.device:
        raise ValueError(
            f"weight is {describe(weight)}, bias is {describe(bias)}: wanted the same channels and device"
        )


def ofd_margins(margins: object, *, values: bool) -> list[Tensor]:
    """The margins of each stage; ``values``: also that none is above 0, which waits for a GPU."""
    found = stages("margins", margins)
    for i, margin in enumerate(found):
        _channels(f"margins[{i}]", margin)
        if values and bool((margin > 0).any()):
            raise ValueError(f"margins[{i}] has {margin.max().item():.6g}, wanted numbers of at most 0")
    return found


def ofd_loss(
    student: object, teacher: object, margins: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors and of margins, or the error that says what is wrong."""
    number("weight", weight)
    students, teachers = _pairs_up(student, teacher, least=1)
    stage_weights(weights, len(students), "stage")
    known = not torch.compiler.is_compiling() and students[0].device.type == "cpu"
    found = ofd_margins(margins, values=known)
    if len(found) != len(students):
        raise ValueError(f"margins has {len(found)}, wanted {len(students)}, one a stage")
    for i, (s, t, margin) in enumerate(zip(students, teachers, found, strict=True)):
        if s.shape != t.shape:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: shapes differ, wanted the"
                " same"
            )
        if margin.shape[0] != t.shape[1] or margin.device != t.device:
            raise ValueError(
                f"margins[{i}] is {describe(margin)}, teacher[{i}] is {describe(t)}: wanted one number a"
                " channel, on its device"
            )
    return students, teachers, found


def _channels(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, wanted a tensor")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} is {describe(x)}, wanted float16, bfloat16, float32 or float64")
    if x.dim() != 1 or 0 in x.shape:
        raise ValueError(f"{name} is {describe(x)}, wanted (C,), one number a channel")


def hcl_loss(
    student: object, teacher: object, weights: object, weight: object
) -> tuple[list[Tensor], list[Tensor]]:
    """The lists of student and teacher tensors, or the error that says what is wrong with the call."""
    number("weight", weight)
    students, teachers = _pairs_up(student, teacher, least=1)
    stage_weights(weights, len(students), "level")
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.dim() != 4:
            raise ValueError(f"student[{i}] is {describe(s)}, wanted (N, C, H, W)")
        if s.shape != t.shape:
            raise ValueError(
                f"student[{i}] is {describe(s)}, teacher[{i}] is {describe(t)}: wanted the same shape"
            )
    return students, teachers
