"""An error keeps no feature alive: after an out-of-memory error whoever tries again with less needs the
memory back at once.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import cpp_missing

import fastkd
from fastkd._implementations import CPP
from fastkd.ops.batch_norm import batch_norm

pytestmark = pytest.mark.skipif(bool(cpp_missing()), reason=f"backend cpp: {cpp_missing()}")
CALLS = {
    "attention_map": lambda s, t: fastkd.attention_map(s[0]),
    "attention_transfer_loss": lambda s, t: fastkd.attention_transfer_loss(s, t),
    "fsp_matrix": lambda s, t: fastkd.fsp_matrix(s[0], s[1]),
    "fsp_loss": lambda s, t: fastkd.fsp_loss(s, t),
    "tap": lambda s, t: fastkd.tap(s[0]),
    "relu_tap": lambda s, t: fastkd.relu_tap(s[0], s[1]),
    "batch_norm": lambda s, t: batch_norm(
        torch.nn.BatchNorm2d(3), s[0].contiguous(memory_format=torch.channels_last)
    ),
}


def fail(operator, *args):
    raise torch.OutOfMemoryError(f"no memory for {operator}")


def features():
    return [[torch.randn(2, 3, 4, 4, requires_grad=need) for _ in range(2)] for need in (True, False)]


@pytest.fixture
def without_collections():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def outlives(call, *, error) -> list[bool]:
    """Whether each feature is still alive after the error that ``call`` ends in was handled."""
    s, t = features()
    alive = [weakref.ref(x) for x in (*s, *t)]
    try:
        call(s, t)
    except error:
        pass
    else:
        pytest.fail("no error")
    del s, t
    return [x() is not None for x in alive]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("function", CALLS)
def test_a_failed_forward_pass_keeps_no_feature(function, grad, monkeypatch, without_collections):
    monkeypatch.setattr(CPP, "run", fail)
    with fastkd.use_backend("cpp"), torch.set_grad_enabled(grad):
        assert outlives(CALLS[function], error=torch.OutOfMemoryError) == [False] * 4


@pytest.mark.parametrize("function", CALLS)
def test_a_failed_backward_pass_keeps_no_feature(function, monkeypatch, without_collections):
    monkeypatch.setattr(CPP, "run_backward", fail)

    def call(s, t):
        out = CALLS[function](s, t)
        (3.7 * (out if isinstance(out, torch.Tensor) else sum(y.sum() for y in out))).sum().backward()

    with fastkd.use_backend("cpp"):
        assert outlives(call, error=torch.OutOfMemoryError) == [False] * 4


@pytest.mark.parametrize("function", CALLS)
def test_a_refused_call_keeps_no_feature(function, without_collections):
    """The refusal of the compiled code is replaced by the sentence that explains it, and shown no more."""
    if function == "batch_norm":
        pytest.skip("a module's own checks")

    def call(s, t):
        for side in (s, t):
            side[0] = side[0][:1, :, :1].expand(1, 3, 0, 4)
        try:
            CALLS[function](s, t)
        except ValueError as error:
            assert error.__suppress_context__ and "\n" not in str(error)
            raise

    with fastkd.use_backend("cpp"):
        assert outlives(call, error=ValueError) == [False] * 4
