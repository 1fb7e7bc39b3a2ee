"""The host's part of calls by Triton: what launchers keep of shapes, and Python frames they pass by."""

from __future__ import annotations

import importlib

import pytest
import torch
from crd_cases import case
from support import missing

import fastkd
from fastkd import kernels
from fastkd._bits import ATTENTION

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(missing("triton")), reason=missing("triton")),
]


def arguments(name: str, count: int) -> tuple:
    x = torch.randn(count, 4)
    if name == "attention":
        x = x[:, :, None, None]
        return [x], [x], ATTENTION.pack(channel_reduce="mean", pool="before"), [0.0, 2.0, 1e-12, 1.0]
    if name == "rkd":
        return x, x, 25.0, 50.0, True, False
    bank = torch.randn(9, 4)
    return x, x, bank, bank, torch.randint(9, (count, 3)), torch.ones(2), 0.5, 1e-7, 1.0, True, False


@pytest.mark.parametrize(
    ("name", "operator"), [("attention", "attention_transfer_loss"), ("rkd", "rkd_pass"), ("crd", "crd_pass")]
)
def test_a_known_shape_leaves_a_full_store_as_it_is(triton, monkeypatch, name, operator):
    loss, launch = importlib.import_module(f"fastkd.kernels.{name}.loss"), kernels.launcher(operator)
    plans = type(loss._plans)()
    monkeypatch.setattr(loss, "_plans", plans)
    known, new = (
        [[triton(y) for y in x] if isinstance(x, list) and torch.is_tensor(x[0]) else x for x in given]
        for given in (
            [triton(x) if torch.is_tensor(x) else x for x in arguments(name, count)] for count in (3, 5)
        )
    )
    launch(*known)
    (key,) = plans
    for i in range(1023):
        plans[i] = None
    kept = plans[key]
    launch(*known)
    assert len(plans) == 1024 and plans[key] is kept
    launch(*new)  # for which all others go
    assert len(plans) == 1 and key not in plans


@pytest.mark.parametrize("name", ["rkd", "crd"])
def test_a_call_passes_by_pytorchs_frames_of_other_functions(triton, monkeypatch, name):
    """Forward and backward go straight to the class's own functions."""

    def never(*args):
        raise AssertionError("a frame too many")

    x, *rest = [triton(y) for y in case(dtype=torch.float32)]
    x.requires_grad_()
    monkeypatch.setattr(torch.autograd.Function, "apply", never)
    monkeypatch.setattr(torch.autograd.function.BackwardCFunction, "apply", never)
    loss = fastkd.rkd_loss(x, rest[0]) if name == "rkd" else fastkd.crd_loss(x, *rest)[0]
    loss.backward()
    assert x.grad is not None and x.grad.any()
