"""PyTorch's FlopCounterMode finds in each backend what it finds in the reference."""

from __future__ import annotations

import pytest
import torch
from child_process import python
from support import KERNELS, place, ref
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from fastkd import kernels
from fastkd._implementations import TRITON

pytestmark = pytest.mark.usefixtures("one_thread")


def stages(*shapes):
    return [torch.randn(shape) for shape in shapes]


THREE = [(8, 16, 8, 8), (8, 32, 4, 4), (8, 64, 2, 2)]
OTHER = [(8, 16, 7, 5), (8, 32, 4, 6), (8, 64, 3, 3)]
SIGNALS = [(2, 3, 9), (2, 4, 6)]
# the functions, student's and teacher's shapes
CALLS = {
    "fsp_loss": (lambda m, s, t: m.fsp_loss(s, t), THREE, THREE),
    "fsp_loss of other sizes": (
        lambda m, s, t: m.fsp_loss(s, t, pool_mode="max", distance="column_l2"),
        THREE,
        OTHER,
    ),
    "fsp_loss of signals": (lambda m, s, t: m.fsp_loss(s, t, weight=3.0), SIGNALS, SIGNALS),
    "fsp_matrix": (
        lambda m, s, t: m.fsp_matrix(*s).square().sum() + m.fsp_matrix(*t).sum(),
        THREE[:2],
        OTHER[1:],
    ),
    "attention_transfer_loss": (lambda m, s, t: m.attention_transfer_loss(s, t), THREE, THREE),
    "taps": (lambda m, s, t: m.relu_tap(s[0])[1].sum() + m.tap(t[0])[1].sum(), THREE[:1], THREE[:1]),
}
# which of (student, teacher) have gradients, stage by stage
LEARNERS = {
    "nobody": (0, 0),
    "student": (-1, 0),
    "teacher": (0, -1),
    "both": (-1, -1),
    "the first stage": (1, 0),
    "the last stage": (4, 1),
}


def count(call, student, teacher, learners):
    bits = [(side >> i) & 1 for side, xs in zip(learners, (student, teacher)) for i in range(len(xs))]
    inputs = [x.detach().requires_grad_(bool(bit)) for x, bit in zip([*student, *teacher], bits)]
    with FlopCounterMode(display=False) as counter:
        loss = call(inputs[: len(student)], inputs[len(student) :])
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("learners", LEARNERS)
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("backend", [KERNELS[0], KERNELS[2]])
def test_a_backend_counts_what_the_reference_counts(backend, function, learners):
    call, *shapes = CALLS[function]
    student, teacher = (stages(*of) for of in shapes)
    # on the CPU: the reference's pooling has no deterministic backward pass on a GPU
    want = count(lambda s, t: call(ref, s, t), student, teacher, LEARNERS[learners])
    student, teacher = ([place(x, backend) for x in side] for side in (student, teacher))
    with fastkd.use_backend(backend):
        assert count(lambda s, t: call(fastkd, s, t), student, teacher, LEARNERS[learners]) == want
    assert (want > 0) == function.startswith("fsp")


def test_triton_asks_the_dispatcher_while_a_mode_watches(cpp, monkeypatch):
    """So that the mode sees its operators; here the operator's kernel is that of the CPU."""
    a, b = stages(*THREE[:2])
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    monkeypatch.setattr(kernels, "launcher", lambda name: lambda *args: name)
    args = (a, b, 0)
    assert TRITON.run("fsp_matrix", *args) == "fsp_matrix"
    with FlopCounterMode(display=False) as counter:
        got = TRITON.run("fsp_matrix", *args)
    torch.testing.assert_close(got, ref.fsp_matrix(a, b))
    assert counter.get_total_flops() == 2 * 8 * 16 * 32 * 4 * 4


def test_formulas_wait_for_the_counter():
    """It imports Triton, which fastkd must not."""
    code = """if True:
        import sys, torch, fastkd
        x = torch.ones(1, 2, 3)
        waiting = "torch.utils.flop_counter" not in sys.modules
        finders = len(sys.meta_path)
        from torch.utils.flop_counter import FlopCounterMode
        assert len(sys.meta_path) == finders - waiting
        with FlopCounterMode(display=False) as counter:
            fastkd.fsp_matrix(x, x)
        assert counter.get_total_flops() == 2 * 2 * 2 * 3
    """
    done = python(code)
    assert done.returncode == 0, done.stderr
