"""The operators of the CPU library give back what they take: tensors reach them, and leave them, by handles
that each side has to free (csrc/common/boxed.h).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import emulated
import pytest
import torch

import fastkd
from fastkd import native
from fastkd.ops.norm import norm_loss

pytestmark = [
    pytest.mark.skipif(not native.CPU.available, reason=native.CPU.reason),
    pytest.mark.skipif(
        not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no mallinfo2, which glibc has from 2.33 on"
    ),
]
CALLS = 100
LEAST = 48  # bytes of the smallest handle that could be lost in a call, with malloc's own


class Malloc(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def in_use() -> int:
    """Bytes that malloc has given out."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Malloc
    gc.collect()
    found = ask()
    return found.uordblks + found.hblkhd


def growth(call: Callable[[], object], calls: int) -> float:
    """Bytes a call leaves behind: the least of three tries, since others use malloc too."""
    found = []
    gc.collect()
    gc.freeze()  # what earlier tests have left is not gone through each time
    for _ in range(4):  # the first fills what is remembered
        before = in_use()
        for _ in range(calls):
            call()
        found.append((in_use() - before) / calls)
    return min(found[1:])


def features(gradient: bool) -> list[torch.Tensor]:
    return [torch.randn(2, channels, 8, 8, requires_grad=gradient) for channels in (4, 8, 8)]


def operations() -> dict[str, Callable[[], object]]:
    s, t = features(True), features(False)
    e, f = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)
    banks, rows = torch.randn(2, 50, 16).unbind(), torch.randint(50, (4, 9))
    margin = torch.zeros(4)

    def gradients(loss: Callable[[], torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), inputs)

    return {
        "attention_transfer_loss": gradients(lambda: fastkd.attention_transfer_loss(s, t), *s),
        "attention_transfer_loss, no gradient": lambda: fastkd.attention_transfer_loss(t, t),
        "attention_map": gradients(lambda: fastkd.attention_map(s[0]).sum(), s[0]),
        "relu_tap": gradients(lambda: fastkd.relu_tap(s[0])[1].sum(), s[0]),
        "fsp_loss": gradients(lambda: fastkd.fsp_loss(s, t), *s),
        "fsp_matrix": gradients(lambda: fastkd.fsp_matrix(s[0], s[1]).sum(), s[0], s[1]),
        "rkd_loss": gradients(lambda: fastkd.rkd_loss(e, f), e),
        "crd_loss": gradients(lambda: fastkd.crd_loss(e, f, *banks, rows)[0], e),
        "hcl_loss": gradients(lambda: fastkd.hcl_loss(s, t), *s),
        "ofd_loss": gradients(lambda: fastkd.ofd_loss(s[0], t[0], margin), s[0]),
        "sakd_map": gradients(lambda: fastkd.sakd_map(s[0]).sum(), s[0]),
        "norm_loss": gradients(lambda: norm_loss(s[1], t[0], 2), s[1]),
    }


@pytest.mark.parametrize("name", operations())
def test_a_call_leaves_nothing_behind(name: str) -> None:
    assert growth(operations()[name], CALLS) < LEAST


def refused() -> dict[str, Callable[[], object]]:
    """Calls by what the kernel itself says of them: a call that never gets there could lose nothing."""
    t, ops = features(False), torch.ops.fastkd
    return {
        "student and teacher must be lists of the same length": lambda: ops.attention_transfer_loss(
            t, t[:1], 0, [0.0, 2.0, 1e-12, 1.0]
        ),
        "student and teacher must hold equally many stages": lambda: ops.fsp_loss(t, t[:1], 0, [0.0, 1.0]),
        "x must have two dimensions": lambda: ops.rkd_lengths(torch.zeros(3)),
    }


@pytest.mark.parametrize("told", refused())
def test_a_call_that_is_refused_leaves_nothing_behind(told: str) -> None:
    call = refused()[told]

    def refuse() -> None:
        with pytest.raises(RuntimeError, match=told):
            call()

    assert growth(refuse, 10) < LEAST


def test_an_argument_that_cannot_be_converted_loses_no_other() -> None:
    emulated.load()
    if native.EMULATED is None:
        pytest.skip("the operator is part of the emulated library")
    a, b, c, d, *e = [torch.ones(1) for _ in range(6)]
    operator = torch.ops.fastkd_testing.refuse.default

    def refuse() -> None:
        with pytest.raises(RuntimeError, match="refused"):
            operator(a, [b], 0, c, d, e, "a string that is longer than what a short one may hold")

    assert growth(refuse, 10) < LEAST


def test_a_lost_tensor_is_seen() -> None:
    lost: list[torch.Tensor] = []
    assert growth(lambda: lost.append(torch.empty(1)), CALLS) > LEAST
