"""The operators of the CUDA library: derivatives, traced graphs, schemas."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import chains
from second_derivatives import SCALARS, refused
from support import values

import fastkd
from fastkd._bits import ATTENTION, FSP

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("function", SCALARS)
def test_a_second_derivative_is_refused_and_names_the_reference(cuda, function):
    refused(function, *(cuda(values((2, 3, 4, 4), torch.float32)).requires_grad_() for _ in range(2)))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss", "relu_tap"])
def test_operators_stand_in_traced_graphs(cuda, function):
    torch.compiler.reset()
    s, t = ([x.detach() for x in chain] for chain in chains(cuda))
    s = [x.requires_grad_() for x in s]

    def call(s, t):
        if function == "relu_tap":
            return sum((v * v).sum() for x, y in zip(s, t) for v in fastkd.relu_tap(x, y))
        return getattr(fastkd, function)(s, t, weight=3.0)

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    got = torch.autograd.grad(torch.compile(call, backend=keep, fullgraph=True)(s, t), s)
    assert f"fastkd_cuda.{function}.default" in "".join(graphs)
    torch.testing.assert_close(got, torch.autograd.grad(call(s, t), s))


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.unpoisoned
def test_operators_keep_what_their_schemas_say(cuda):
    ops = torch.ops.fastkd_cuda
    s, t = chains(cuda)
    x = s[0].detach().requires_grad_()
    transfer = ATTENTION.pack(channel_reduce="mean", pool="before", student_grad=True)
    chain = FSP.pack(precision="ieee", with_grad=True)
    for operator, args in (
        (ops.attention_map, (x, 2.0, "mean", False, True, 1e-12, "clamp")),
        (ops.relu_tap, (x, t[0], 2.0, "mean", False, 1e-12, "clamp")),
        (ops.attention_transfer_loss, (s, t, transfer, [0.0, 2.0, 1e-12, 3.0])),
        (ops.fsp_matrix, (x, t[1], FSP.pack(precision="ieee"))),
        (ops.fsp_loss, (s, t, chain, [0.0, 1.0])),
    ):
        torch.library.opcheck(operator.default, args, test_utils=OPCHECKS)
