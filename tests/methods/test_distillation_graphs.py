"""A step of every method is one graph."""

from __future__ import annotations

import copy

import pytest
import torch
from distillation_cases import batch, distillation_of

from fastkd.methods import METHODS

# the terms of a sum do not meet, so one graph stands for several methods
GRAPHS = (
    "fitnet+at+fsp+ofd+rkd+crd+kd+dkd",
    "reviewkd+srrl+afd+semckd+sakd+kd",
    "simkd",
    "norm",
    "wrapping",
    "scheduled+bank+normed+toy",
)


def test_every_method_is_in_one_of_the_graphs():
    assert {*METHODS[1:]} <= {term for name in GRAPHS for term in name.split("+")}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_step_is_one_graph(name):
    torch._dynamo.reset()
    distillation = distillation_of(name)
    images, labels, index = batch()
    compiled = torch.compile(copy.deepcopy(distillation), fullgraph=True, backend="aot_eager")
    for epoch in range(2):  # a weight that changes is no other graph
        results = []
        for module, forward in ((distillation, distillation), (compiled._orig_mod, compiled)):
            module.set_epoch(epoch, 4)
            module.zero_grad()
            with torch._dynamo.config.patch(error_on_recompile=epoch > 0):
                losses = forward(images, labels, index)
            losses.total.backward()
            module.update(index, losses.records)
            results.append(
                [losses, [p.grad for p in module.parameters() if p.grad is not None], list(module.buffers())]
            )
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
