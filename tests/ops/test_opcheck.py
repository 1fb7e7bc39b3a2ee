"""PyTorch's own checks of every operator: schema, fakes, autograd registration, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from support import make

from fastkd._bits import ATTENTION, FSP

pytestmark = [pytest.mark.unpoisoned, pytest.mark.usefixtures("one_thread")]


MAP = (2.0, "mean", False, True, 1e-12, "clamp")


def at_options(student_grad, teacher_grad, weights=(), upstream=None, **switches):
    switches = {"channel_reduce": "mean", "pool": "before"} | switches
    grads = {"student_grad": student_grad, "teacher_grad": teacher_grad, "prepare": upstream is not None}
    return ATTENTION.pack(**switches, **grads), [upstream or 0.0, 2.0, 1e-12, 1.0, *weights]


def samples():
    ops = torch.ops.fastkd
    for dtype, layout in (
        (torch.float32, "contiguous"),
        (torch.float64, "channels_last"),
        (torch.bfloat16, "sliced"),
        (torch.float32, "swapped"),
    ):
        grad = dtype != torch.bfloat16  # opcheck's gradients are compared at float32's tolerance

        def leaf(*shape):
            return make(shape, dtype, layout).requires_grad_(grad)

        x, y = leaf(2, 3, 5, 4), leaf(2, 6, 3, 7)
        yield ops.attention_map.default, (x, *MAP)
        yield ops.attention_map.default, (x, 3.0, "sum", True, False, 0.1, "add")
        m, n = ops.attention_map(x.detach(), *MAP)
        yield ops.attention_map_backward.default, (torch.randn_like(m), x.detach(), m, n, *MAP)
        s, t = [x, y], [leaf(2, 4, 5, 4), leaf(2, 6, 5, 4)]
        yield ops.attention_transfer_loss.default, (s, t, *at_options(grad, grad))
        yield (
            ops.attention_transfer_loss.default,
            (s, [v.detach() for v in t], *at_options(grad, False, [1.0, 2.0], pool="after", difference="l2")),
        )
        plain = [v.detach() for v in (*s, *t)]
        yield (
            ops.attention_transfer_loss.default,
            (plain[:2], plain[2:], *at_options(True, False, upstream=-2.5, pool="after")),
        )
        same = [leaf(2, 4, 5, 4).detach(), leaf(2, 5, 3, 7).detach()]
        options = at_options(True, False, upstream=-2.5)  # of equal sizes: the coefficients are in one tensor
        yield ops.attention_transfer_loss.default, (plain[:2], same, *options)
        assert len(ops.attention_transfer_loss(plain[:2], same, *options)[1]) == 1
        options = at_options(True, True)
        loss, coefficients, _ = ops.attention_transfer_loss(plain[:2], plain[2:], *options)
        yield (
            ops.attention_transfer_loss_backward.default,
            (torch.ones_like(loss), plain, coefficients, 2.0, options[0]),
        )
        for b in (y, leaf(2, 4, 5, 4)):
            yield ops.fsp_matrix.default, (x, b, 0)
            g = ops.fsp_matrix(x.detach(), b.detach(), 0)
            for a_grad in (True, False):
                options = FSP.pack(a_grad=a_grad, b_grad=True)
                yield (
                    ops.fsp_matrix_backward.default,
                    (torch.randn_like(g), x.detach(), b.detach(), options),
                )
        t = [leaf(2, 3, 5, 4), leaf(2, 6, 2, 8)]
        yield ops.fsp_loss.default, (s, t, FSP.pack(with_grad=grad), [0.0, 1.0])
        options = FSP.pack(
            pool_mode="max", distance="column_l2", pair_reduce="mean", precision="tf32", with_grad=grad
        )
        yield ops.fsp_loss.default, (s, [v.detach() for v in t], options, [0.0, 3.0, 2.0])
        plain = [v.detach() for v in (*s, *t)]
        loss, matrices, _ = ops.fsp_loss(plain[:2], plain[2:], FSP.pack(with_grad=True), [0.0, 1.0])
        yield (ops.fsp_loss_backward.default, (torch.ones_like(loss), plain[:2], matrices, 0, [0, 1], []))
        yield (
            ops.fsp_loss_backward.default,
            (torch.ones_like(loss), plain[2:], matrices, FSP.pack(negate=True), [1], []),
        )


OPERATORS = [
    f"{function}{suffix}"
    for function in ("attention_map", "attention_transfer_loss", "fsp_matrix", "fsp_loss")
    for suffix in ("", "_backward")
]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_passes_opcheck(cpp, operator):
    checked = 0
    for op, args in samples():
        if op is getattr(torch.ops.fastkd, operator).default:
            torch.library.opcheck(op, args)
            checked += 1
    assert checked >= 4


def test_fakes_give_the_real_shapes_dtypes_and_strides(cpp):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op, args in samples():
        with torch.no_grad():
            real = torch.utils._pytree.tree_leaves(op(*args))
            with FakeTensorMode() as mode:
                fake = torch.utils._pytree.tree_leaves(
                    op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args))
                )
        assert [(x.shape, x.dtype, x.stride(), x.device) for x in real] == [
            (x.shape, x.dtype, x.stride(), x.device) for x in fake
        ], op
