"""Losses compiled by inductor, whose graphs may save their inputs, of a teacher run under
``torch.inference_mode``.
"""

from __future__ import annotations

import pytest
import torch
from support import cpp_missing, ref

import fastkd

pytestmark = [pytest.mark.unpoisoned, pytest.mark.usefixtures("one_thread")]
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
)
MAPS = [(4, 6, 8, 8), (4, 3, 6, 6)]
LOSSES = {
    "kd of 2 classes": ([(8, 2)], [(8, 2)], lambda m, s, t: m.kd_loss(s[0], t[0])),
    "kd of 100 classes": (
        [(8, 100)],
        [(8, 100)],
        lambda m, s, t: m.kd_loss(s[0], t[0], 1.0, reduction="mean"),
    ),
    "kd of 1000 classes": ([(8, 1000)], [(8, 1000)], lambda m, s, t: m.kd_loss(s[0], 0.5 * t[0])),
    "at": (
        MAPS,
        [(4, 1, 8, 8), (4, 2, 5, 7)],
        lambda m, s, t: m.attention_transfer_loss(
            s, t, 3, pool="after", difference="l2", weights=[1.0, 2.0], weight=10.0
        ),
    ),
    "at of the teacher's maps": (
        MAPS,
        [(4, 8, 8), (4, 6, 6)],
        lambda m, s, t: m.attention_transfer_loss(s, t, teacher_is_map=True),
    ),
    "fsp of one position": (
        [(4, 16, 4, 4), (4, 16, 1, 1), (4, 8, 1, 1)],
        [(4, 16, 2, 2), (4, 16, 1, 1), (4, 8, 1, 1)],
        lambda m, s, t: m.fsp_loss(s, t, weight=100.0),
    ),
}


@pytest.mark.parametrize(
    "loss, backend",
    [(name, "auto") for name in LOSSES]
    + [
        pytest.param(name, "cpp", marks=CPP.marks)
        for name in ("at of the teacher's maps", "fsp of one position")
    ],
)
def test_a_teacher_of_inference_mode_fits_every_compiled_loss(loss, backend):
    torch.compiler.reset()
    student_shapes, teacher_shapes, fn = LOSSES[loss]
    student = [torch.randn(shape, requires_grad=True) for shape in student_shapes]
    with torch.inference_mode():
        teacher = [torch.randn(shape) for shape in teacher_shapes]
    before = [x.clone() for x in teacher]
    compiled = torch.compile(lambda s, t: fn(fastkd, s, t), fullgraph=True)
    exact = fn(ref, student, [x.clone() for x in teacher])
    with fastkd.use_backend(backend):
        got = compiled(student, teacher)
        gradients = torch.autograd.grad(got, student)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(exact, student)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * b.abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(teacher, before))


def test_only_graphs_with_a_gradient_on_one_side_alone_are_told_what_to_save():
    names = []

    def record(graph, example):
        names.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def told(student, teacher, grad=True):
        names.clear()
        torch.compiler.reset()
        with torch.set_grad_enabled(grad):
            torch.compile(fastkd.kd_loss, fullgraph=True, backend=record)(student, teacher)
        return any("recompute_barrier" in name for name in names[0])

    plain, learning = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    assert told(learning, plain) and told(plain, learning)
    assert not told(plain, plain) and not told(learning, learning) and not told(learning, plain, grad=False)


def test_compiled_losses_can_be_mapped_over_a_batch():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    each = torch.func.vmap(torch.func.grad(fastkd.kd_loss))
    torch.compiler.reset()
    torch.testing.assert_close(
        torch.compile(each, backend="aot_eager", fullgraph=True)(student, teacher), each(student, teacher)
    )
