"""torch.compile without graph breaks, torch.export, and PyTorch's own checks of every operator."""

from __future__ import annotations

import pytest
import torch
from support import cpp_missing, ref, values
from torch import nn

import fastkd

pytestmark = [pytest.mark.unpoisoned, pytest.mark.usefixtures("one_thread")]
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
)
BACKENDS = ["auto", CPP]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    """Two stages, each with an input of its own, so that their sizes are independent symbols in a dynamic
    graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Linear(6, 5),
        )

    def forward(self, x, y):
        a, b = self.first(x).relu(), self.second(y).relu()
        return [a, b], self.head(b.mean((2, 3)) + a.mean())


LOSSES = {
    "at": lambda m, s, t, zs, zt: m.attention_transfer_loss(s, t, weight=1000.0),
    "at with every switch": lambda m, s, t, zs, zt: m.attention_transfer_loss(
        s,
        t[::-1],
        3,
        channel_reduce="sum",
        signed=True,
        eps=1e-6,
        eps_mode="add",
        pool="after",
        pool_mode="max",
        difference="l2",
        stage_reduce="mean",
        weights=[1.0, 0.5],
        weight=10.0,
    ),
    "map": lambda m, s, t, zs, zt: (
        m.attention_map(s[1]).max()
        + m.attention_transfer_loss(s[0], m.attention_map(t[0]), teacher_is_map=True)
    ),
    "fsp": lambda m, s, t, zs, zt: m.fsp_loss(s, t),
    "matrix": lambda m, s, t, zs, zt: (m.fsp_matrix(*s) - m.fsp_matrix(*t)).square().sum(),
    "kd": lambda m, s, t, zs, zt: m.kd_loss(zs, zt),
}


def step(functions, losses, student, teacher, *images):
    s, zs = student(*images)
    with torch.no_grad():
        t, zt = teacher(*images)
    return zs.logsumexp(1).mean() + sum(LOSSES[loss](functions, s, t, zs, zt) for loss in losses)


def gradients(fn, student, *rest):
    student.zero_grad(set_to_none=True)
    loss = fn(student, *rest)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in student.parameters())]


def agree(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


def images(n, first, second):
    return torch.randn(n, 3, *first), torch.randn(n, 3, *second)


def step_agrees(losses, sizes, **how):
    student, teacher = Net(), Net()
    compiled = torch.compile(lambda *args: step(fastkd, losses, *args), fullgraph=True, **how)
    for size in sizes:
        x = images(*size)
        agree(
            gradients(compiled, student, teacher, *x),
            gradients(lambda *args: step(ref, losses, *args), student, teacher, *x),
        )


STATIC = [(4, (10, 10), (5, 4))]
DYNAMIC = [*STATIC, (3, (11, 9), (6, 5)), (5, (8, 14), (7, 3))]


@pytest.mark.parametrize("losses", [[loss] for loss in LOSSES], ids="".join)
@pytest.mark.parametrize(
    "backend, dynamic",
    [
        ("auto", False),
        pytest.param("cpp", False, marks=CPP.marks),
        pytest.param("cpp", True, marks=CPP.marks),
    ],
)
def test_a_training_step_compiles_as_one_graph(backend, dynamic, losses):
    with fastkd.use_backend(backend):
        step_agrees(losses, DYNAMIC if dynamic else STATIC, dynamic=dynamic, backend="aot_eager")


def test_a_training_step_with_dynamic_shapes_compiles_as_one_graph_under_auto():
    with fastkd.use_backend("auto"):
        step_agrees(["at", "fsp"], DYNAMIC[:2], dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_compiles_through_inductor(backend):
    with fastkd.use_backend(backend):
        step_agrees(["at", "fsp"], STATIC, dynamic=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_map_with_itself_keeps_its_whole_gradient_when_compiled(backend, dynamic):
    def fn(m, x, y):
        return (
            m.fsp_loss([x, x], [y, y])
            + m.fsp_matrix(x, x).square().sum()
            + m.attention_transfer_loss([x, x], [y, x])
        )

    compiled = torch.compile(
        lambda x, y: fn(fastkd, x, y), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    x, y = (values((2, 3, 4, 4), torch.float64).requires_grad_() for _ in range(2))
    want = torch.autograd.grad(fn(ref, x, y), (x, y))
    with fastkd.use_backend(backend):
        for call in (compiled, lambda x, y: fn(fastkd, x, y)):
            for got, exact in zip(torch.autograd.grad(call(x, y), (x, y)), want):
                torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_takes_an_inference_mode_teacher_and_half_precision(backend):
    def fn(m, s, t):
        return m.attention_transfer_loss(s, t, weight=1000.0) + m.fsp_loss(s, t)

    s = [
        values((2, c, n, n), torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
        for c, n in ((3, 6), (4, 3))
    ]
    with torch.inference_mode():
        t = [values(x.shape, torch.float16) for x in s]
    compiled = torch.compile(lambda s, t: fn(fastkd, s, t), fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(fn(ref, s, [x.clone() for x in t]), s)
    with fastkd.use_backend(backend):
        got = torch.autograd.grad(compiled(s, t), s)
    for a, b in zip(got, want):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * b.abs().max().item())


def test_another_backend_traces_another_graph(cpp):
    x = torch.randn(2, 3, 4, 4)
    graphs = []

    def record(graph, example):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(fastkd.attention_map, fullgraph=True, backend=record)
    for backend in ("cpp", "reference", "cpp"):
        with fastkd.use_backend(backend):
            torch.testing.assert_close(compiled(x), ref.attention_map(x))
    assert [torch.ops.fastkd.attention_map.default in targets for targets in graphs] == [True, False]


def test_misuse_inside_a_compiled_function_is_told_too(cpp):
    for backend in ("auto", "cpp"):
        torch.compiler.reset()
        with fastkd.use_backend(backend), pytest.raises(Exception, match="batch sizes differ"):
            torch.compile(fastkd.attention_transfer_loss, fullgraph=True, backend="eager")(
                torch.ones(2, 3, 4), torch.ones(3, 3, 4)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_maps_and_matrices_export(backend, dynamic):
    class Export(nn.Module):
        def forward(self, a, b):
            return fastkd.attention_map(a), fastkd.attention_map(b, 3.0, signed=True), fastkd.fsp_matrix(a, b)

    a, b = values((4, 3, 8, 8), torch.float32), values((4, 5, 4, 4), torch.float32)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch}) if dynamic else None
    with fastkd.use_backend(backend):
        program = torch.export.export(Export(), (a, b), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("fastkd.fsp_matrix.default" in targets) == (backend == "cpp")
    if dynamic:
        a, b = torch.randn(6, 3, 8, 8), torch.randn(6, 5, 4, 4)
    for got, want in zip(
        program.module()(a, b),
        (ref.attention_map(a), ref.attention_map(b, 3.0, signed=True), ref.fsp_matrix(a, b)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# PyTorch's own checks of schema, fakes, autograd registration and AOT dispatch
