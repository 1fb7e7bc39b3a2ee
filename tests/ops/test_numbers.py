"""Numbers among the arguments: what is taken for one, what is refused, how often one that changes is
compiled.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import cpp_missing
from torch import nn

import fastkd
from fastkd.compat import kdzoo, repdistiller

pytestmark = pytest.mark.usefixtures("one_thread")
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
)
BACKENDS = ["auto", CPP, "reference"]
STUDENT, TEACHER = ([torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)] for _ in range(2))
LOGITS = torch.randn(2, 5), torch.randn(2, 5)

CALLS = {
    "attention_map": lambda **number: fastkd.attention_map(STUDENT[0], **number),
    "tap": lambda **number: fastkd.tap(STUDENT[0], **number)[1],
    "relu_tap": lambda **number: fastkd.relu_tap(STUDENT[0], **number)[1],
    "attention_transfer_loss": lambda **number: fastkd.attention_transfer_loss(STUDENT, TEACHER, **number),
    "fsp_loss": lambda **number: fastkd.fsp_loss(STUDENT, TEACHER, **number),
    "kd_loss": lambda **number: fastkd.kd_loss(*LOGITS, **number),
}
NUMBERS = {
    "attention_map": ("p", "eps"),
    "tap": ("p", "eps"),
    "relu_tap": ("p", "eps"),
    "attention_transfer_loss": ("p", "eps", "weight", "weights"),
    "fsp_loss": ("weight", "weights"),
    "kd_loss": ("temperature", "weight"),
}
ARGUMENTS = [(function, name) for function, names in NUMBERS.items() for name in names]
MODULES = {"attention_transfer_loss": fastkd.AttentionTransfer, "fsp_loss": fastkd.FSP, "kd_loss": fastkd.KD}
IN_MODULES = [pair for pair in ARGUMENTS if pair[0] in MODULES]

NOT_NUMBERS = {
    "tensor": torch.tensor(2.0),
    "tensor with a gradient": torch.tensor(2.0, requires_grad=True),
    "Parameter": nn.Parameter(torch.ones(1)),
    "bool": True,
    "NumPy's bool": np.bool_(True),
    "array": np.ones((3, 1)),
    "string": "2",
    "complex number": 2j,
}
NOT_FINITE = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "NumPy's nan": np.float32("nan"),
    "NumPy's inf": np.float64("inf"),
}
GOOD = {
    "int": 3,
    "float16": np.float16(3),
    "float32": np.float32(3),
    "float64": np.float64(3),
    "int64": np.int64(3),
    "uint8": np.uint8(3),
}


def argument(function, name, value):
    """``weights`` takes a sequence: the value is its last number."""
    if name != "weights":
        return {name: value}
    return {name: [1.0, value] if function.startswith("attention") else [value]}


def refused(call, kind, name):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert (
        type(caught.value) is kind and message.startswith(name) and "\n" not in message and len(message) < 200
    ), message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_what_is_no_finite_number_is_refused(function, name, backend):
    with fastkd.use_backend(backend):
        for value in NOT_NUMBERS.values():
            refused(lambda: CALLS[function](**argument(function, name, value)), TypeError, name)
        for value in NOT_FINITE.values():
            refused(lambda: CALLS[function](**argument(function, name, value)), ValueError, name)
        if name == "weights":
            for value in (torch.ones(2), nn.Parameter(torch.ones(2)), 1.0, "11"):
                refused(lambda: CALLS[function](weights=value), TypeError, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_integers_and_numpy_numbers_are_numbers(function, name, backend):
    with fastkd.use_backend(backend):
        want = CALLS[function](**argument(function, name, 3.0))
        for value in GOOD.values():
            assert torch.equal(CALLS[function](**argument(function, name, value)), want)


@pytest.mark.parametrize("function, name", IN_MODULES)
def test_modules_refuse_what_is_no_finite_number_when_it_is_given(function, name):
    """At once, not in the first step, and a Parameter does not become one of the module."""
    module = MODULES[function]()
    for values, kind in ((NOT_NUMBERS, TypeError), (NOT_FINITE, ValueError)):
        for value in values.values():
            given = argument(function, name, value)
            refused(lambda: MODULES[function](**given), kind, name)
            refused(lambda: setattr(module, name, given[name]), kind, name)
    assert not list(module.parameters())


@pytest.mark.parametrize("function, name", IN_MODULES)
def test_numbers_of_modules_are_floats(function, name):
    for value in GOOD.values():
        given = argument(function, name, value)
        held = getattr(MODULES[function](**given), name)
        assert held == argument(function, name, 3.0)[name]
        assert {type(number) for number in (held if name == "weights" else [held])} == {float}


COMPAT = {
    "repdistiller.Attention": (repdistiller.Attention, "p", (STUDENT, TEACHER)),
    "repdistiller.DistillKL": (repdistiller.DistillKL, "T", LOGITS),
    "kdzoo.AT": (kdzoo.AT, "p", (STUDENT[0], TEACHER[0])),
    "kdzoo.SoftTarget": (kdzoo.SoftTarget, "T", LOGITS),
}


@pytest.mark.parametrize("module", COMPAT)
def test_numbers_of_other_projects_modules_are_floats_too(module):
    kind, name, _ = COMPAT[module]
    assert [type(getattr(kind(value), name)) for value in GOOD.values()] == [float] * len(GOOD)
    for value in NOT_NUMBERS.values():
        refused(lambda: kind(value), TypeError, name)
    for value in NOT_FINITE.values():
        refused(lambda: kind(value), ValueError, name)


# in compiled graphs


def counted():
    """A compiler's backend that only counts its graphs, and the count."""
    graphs = []
    return (lambda graph, example: (graphs.append(graph), graph.forward)[1]), graphs


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["float32", "int64"])
def test_compiled_functions_take_numpy_numbers(kind):
    def everything(value):
        return [CALLS[function](**argument(function, name, value)) for function, name in ARGUMENTS]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with fastkd.use_backend("auto"):
        for number in (3, 2):
            for got, want in zip(
                compiled(np.dtype(kind).type(number)), everything(float(number)), strict=True
            ):
                torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_graphs_of_a_backend_take_numpy_numbers_as_weight_and_refuse_others(cpp, function, name):
    compiled = torch.compile(
        lambda value: CALLS[function](**argument(function, name, value)), fullgraph=True, backend="eager"
    )
    with fastkd.use_backend(cpp):
        if name == "weight" or function == "kd_loss":
            torch.testing.assert_close(
                compiled(np.float32(3)), CALLS[function](**argument(function, name, 3.0))
            )
            return
        with pytest.raises(Exception, match=name) as caught:
            compiled(np.float32(3))
    assert "which the graph of a backend asked for by name cannot hold: wanted float(" in str(caught.value)


SERIES = (1, 2.5, 3, 4, 5.0)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function, name", IN_MODULES)
def test_a_modules_number_that_changes_compiles_two_graphs(function, name):
    backend, graphs = counted()
    module = MODULES[function]()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    inputs = LOGITS if function == "kd_loss" else (STUDENT, TEACHER)
    with fastkd.use_backend("auto"):
        for value in SERIES:
            setattr(module, name, argument(function, name, value)[name])
            torch.testing.assert_close(compiled(*inputs), CALLS[function](**argument(function, name, value)))
    assert len(graphs) <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("function", MODULES)
def test_a_weight_that_changes_compiles_two_graphs_of_a_backend(cpp, function):
    backend, graphs = counted()
    module = MODULES[function]()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    inputs = LOGITS if function == "kd_loss" else (STUDENT, TEACHER)
    with fastkd.use_backend(cpp):
        for module.weight in SERIES:
            torch.testing.assert_close(compiled(*inputs), CALLS[function](weight=module.weight))
    assert len(graphs) <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("module", COMPAT)
def test_another_projects_number_that_changes_compiles_two_graphs(module):
    kind, name, inputs = COMPAT[module]
    instance, (backend, graphs) = kind(2), counted()
    compiled = torch.compile(instance, fullgraph=True, backend=backend)
    with fastkd.use_backend("auto"):
        for value in SERIES:
            setattr(instance, name, value)
            # negative features under a signed power
            torch.testing.assert_close(compiled(*inputs), instance(*inputs), equal_nan=True)
    assert len(graphs) <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss"])
def test_the_weight_in_a_graph_is_applied_before_a_gradient_is_rounded(cpp, function, dtype):
    student, teacher = ([torch.randn(64, c, 8, 8).to(dtype) for c in (16, 16)] for _ in range(2))
    student = [x.requires_grad_() for x in student]

    def loss(student, teacher):
        return getattr(fastkd, function)(student, teacher, weight=1000.0)

    with fastkd.use_backend(cpp):
        want = torch.autograd.grad(loss(student, teacher), student)
        got = torch.autograd.grad(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher), student
        )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).tiny)
        assert (a != 0).float().mean() > 0.9
