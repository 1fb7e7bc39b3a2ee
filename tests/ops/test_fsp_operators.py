"""The operators of the FSP loss: what they save of each pair, and what a graph knows of it."""

from __future__ import annotations

import pytest
import torch
from support import cpp_missing, make

import fastkd
from fastkd._bits import FSP
from fastkd.ops._fsp_operators import _loss_fake_by_device, apart

pytestmark = pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
NUMBERS = [1.0, 1.0]
# channels and side of the stages; whether all matrices come in one tensor beside prepared gradients
CHAINS = {
    "equal": ([(3, 6), (5, 6), (4, 6)], True),
    "shrinking": ([(3, 6), (5, 4), (4, 3)], True),
    "two stages": ([(3, 6), (5, 6)], True),
    "products over channels": ([(32, 2), (32, 2), (5, 2)], False),
    "more stages than lie on the stack": ([(3, 4)] * 11, True),
}


def run(chain, dtype=torch.float32, **switches):
    student, teacher = ([make((2, c, n, n), dtype) for c, n in chain] for _ in range(2))
    options = FSP.pack(with_grad=True, **switches)
    return student, teacher, options, torch.ops.fastkd.fsp_loss(student, teacher, options, NUMBERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chain, joined", CHAINS.values(), ids=CHAINS)
def test_a_graph_knows_every_result(chain, joined, dtype):
    for prepare in (False, True):
        student, teacher, options, found = run(chain, dtype, prepare=prepare)
        known = _loss_fake_by_device(student, teacher, options, NUMBERS)
        for a, b in zip(found, known, strict=True):
            a, b = ([x] if isinstance(x, torch.Tensor) else x for x in (a, b))
            assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
        together = prepare and joined
        assert (found[1][0].dim() == 1) == together


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chain", [c for c, joined in CHAINS.values() if joined])
def test_matrices_in_one_tensor_are_those_of_the_pairs(chain, dtype):
    student, teacher, options, (loss, saved, _) = run(chain, dtype, prepare=True)
    separate = options & ~FSP.bits("prepare")
    same_loss, matrices, _ = torch.ops.fastkd.fsp_loss(student, teacher, separate, NUMBERS)
    assert torch.equal(loss, same_loss)
    assert len(saved) == 1
    for a, b in zip(apart(saved, student), matrices, strict=True):
        assert torch.equal(a, b)


def test_a_loss_saves_one_tensor_beside_the_features():
    student = [make((2, c, 5, 5)).requires_grad_() for c in (2, 3, 4)]
    loss = fastkd.fsp_loss(student, [x.detach() * 2 for x in student])
    assert len(loss.grad_fn.saved_tensors) == len(student) + 1


def test_a_teacher_that_learns_has_gradients_from_matrices_in_one_tensor():
    """Beside a student whose gradients are prepared: the same bits as without."""
    chain = [(3, 6), (5, 6), (4, 6)]
    student, teacher = ([make((2, c, n, n)).requires_grad_() for c, n in chain] for _ in range(2))
    together = torch.autograd.grad(fastkd.fsp_loss(student, teacher), [*student, *teacher])
    alone = torch.autograd.grad(fastkd.fsp_loss([x.detach() for x in student], teacher), teacher)
    for a, b in zip(together[len(student) :], alone, strict=True):
        assert torch.equal(a, b)
