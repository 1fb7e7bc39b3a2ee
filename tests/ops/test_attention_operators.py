"""The operators of the attention-transfer loss: what they give beside the loss, and what a graph knows."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import cpp_missing, make
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd._bits import ATTENTION
from fastkd.ops._attention_operators import _loss_fake, apart
from fastkd.ops.attention import AttentionTransferFunction

pytestmark = pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
NUMBERS = [1.0, 2.0, 1e-12, 1.0]
# student's and teacher's sizes; whether the student's coefficients come in one tensor
SIZES = {
    "equal": ([(9, 9), (4, 3)], [(9, 9), (4, 3)], True),
    "one stage": ([(5, 2)], [(5, 2)], True),
    "larger teacher": ([(4, 4), (2, 2)], [(8, 4), (5, 5)], True),
    "pooled student": ([(9, 9), (4, 3)], [(9, 9), (4, 2)], False),
    "one position": ([(9, 9), (1, 1)], [(9, 9), (1, 1)], False),
    "tokens": ([(7,), (5,)], [(7,), (5,)], True),
}


def features(sizes, dtype=torch.float32):
    return [[make((3, 4, *size), dtype) for size in side] for side in sizes[:2]]


def run(student, teacher, **switches):
    options = ATTENTION.pack(channel_reduce="mean", student_grad=True, **switches)
    return options, torch.ops.fastkd.attention_transfer_loss(student, teacher, options, NUMBERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_graph_knows_every_result(sizes, dtype):
    for pool, prepare, teacher_grad in itertools.product(("before", "after"), *[(False, True)] * 2):
        switches = dict(pool=pool, prepare=prepare, teacher_grad=teacher_grad)
        student, teacher = features(sizes, dtype)
        options, found = run(student, teacher, **switches)
        known = _loss_fake(student, teacher, options, NUMBERS)
        for a, b in zip(found, known, strict=True):
            a, b = ([x] if isinstance(x, torch.Tensor) else x for x in (a, b))
            assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b], switches
        assert (found[1][0].dim() == 1) == (prepare and not teacher_grad and sizes[2]), switches


def test_on_a_gpu_a_graph_knows_a_tensor_a_stage():
    """Neither library for GPUs puts coefficients in one tensor."""
    options = ATTENTION.pack(channel_reduce="mean", student_grad=True, prepare=True)
    with FakeTensorMode():
        x = [torch.empty(2, 3, 4, 4, device="cuda")]
        _, coefficients, _ = torch.ops.fastkd.attention_transfer_loss(x, x, options, NUMBERS)
    assert [tuple(k.shape) for k in coefficients] == [(2, 4, 4)]


@pytest.mark.parametrize(
    "sizes", [x for x in SIZES.values() if x[2]], ids=[k for k, x in SIZES.items() if x[2]]
)
def test_coefficients_in_one_tensor_are_those_of_the_stages(sizes):
    student, teacher = features(sizes)
    _, (loss, (joined,), _) = run(student, teacher, pool="before", prepare=True)
    _, (same_loss, separate, _) = run(student, teacher, pool="before")
    assert torch.equal(loss, same_loss)
    for a, b in zip(apart(joined, student), separate, strict=True):
        assert torch.equal(a, b)


def test_a_loss_saves_one_tensor_beside_the_features():
    student = [make((3, c, 5, 5)).requires_grad_() for c in (2, 3, 4)]
    loss = fastkd.attention_transfer_loss(student, [x.detach() * 2 for x in student])
    assert len(loss.grad_fn.saved_tensors) == len(student) + 1


def test_a_call_passes_by_pytorchs_frames_of_other_functions(monkeypatch):
    """Forward and backward go straight to the class's own functions."""

    def never(*args):
        raise AssertionError("a frame too many")

    monkeypatch.setattr(torch.autograd.Function, "apply", never)
    monkeypatch.setattr(torch.autograd.function.BackwardCFunction, "apply", never)
    x = make((3, 4, 5, 5)).requires_grad_()
    fastkd.attention_transfer_loss(x, make((3, 4, 5, 5))).backward()
    assert x.grad is not None
    assert AttentionTransferFunction.apply.__self__ is AttentionTransferFunction
