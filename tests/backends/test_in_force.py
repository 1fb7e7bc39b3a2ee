"""Where use_backend holds: threads, async tasks, and the threads in which autograd runs backward passes."""

from __future__ import annotations

import _thread
import asyncio
import gc
import sys
import threading
import tracemalloc
from concurrent.futures import Future

import pytest
import torch

import fastkd
from fastkd import _in_force, backends

pytestmark = pytest.mark.usefixtures("one_thread")
FROM_EVERY_THREAD = hasattr(torch._C, "_remove_obj_from_tls")
"""Whether backward passes take what is in force where they are begun, not from the main thread alone."""


def test_use_backend_holds_in_its_own_thread_only():
    seen = []
    with fastkd.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(fastkd.attention_map(torch.ones(1, 1, 1))))
        thread.start()
        thread.join()
    assert len(seen) == 1


class _Deeper(torch.autograd.Function):
    """Its backward pass runs another one, and so on; the innermost calls ``function(x)``. So deep, autograd
    goes on in a thread of its own, as it does for every backward pass on a GPU.
    """

    @staticmethod
    def forward(ctx, x, depth, function):
        ctx.depth, ctx.function = depth, function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = torch.ones(2, 3, 4, requires_grad=True)
            y = _Deeper.apply(x, ctx.depth - 1, ctx.function) if ctx.depth else ctx.function(x)
            y.sum().backward()
        return grad, None, None


def _in_autograds_own_thread(function):
    """What ``function()`` says in a thread of autograd's own, in a backward pass that is begun here."""
    said = []

    def call(x):
        said.append((threading.get_ident(), function()))
        return x * 1

    _Deeper.apply(torch.ones(1, requires_grad=True), 70, call).sum().backward()
    ((thread, found),) = said
    assert thread != threading.get_ident(), "autograd did not leave this thread"
    return found


@pytest.mark.parametrize("name", ["reference", "cpp"])
def test_use_backend_holds_in_autograds_own_threads(cpp, name):
    """Where checkpointing runs the forward pass of a GPU's tensors again."""
    seen = []

    def call(x):
        seen.append((threading.get_ident(), backends.current()))
        with fastkd.use_backend("auto"):
            seen.append((threading.get_ident(), backends.current()))
        seen.append((threading.get_ident(), backends.current()))
        with backends.record_calls() as calls:
            y = fastkd.attention_map(x)
        seen.append((threading.get_ident(), backends.select(*calls[0][:4]).name))
        return y

    with fastkd.use_backend("triton"), fastkd.use_backend(name):
        _Deeper.apply(torch.ones(1, requires_grad=True), 70, call).sum().backward()
        assert backends.current() == name
    (thread,) = {thread for thread, _ in seen}
    assert thread != threading.get_ident(), "autograd did not leave this thread"
    assert [found for _, found in seen] == [name, "auto", name, name]


def test_a_thread_of_pythons_keeps_its_own_choice_in_its_backward_passes():
    seen = []

    def run():
        _Deeper.apply(
            torch.ones(1, requires_grad=True), 1, lambda x: (seen.append(backends.current()), x * 1)[1]
        ).sum().backward()

    outside = backends.current()
    with fastkd.use_backend("triton"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen == [outside]


def test_use_backend_holds_in_its_own_async_task_only():
    async def task(name):
        with fastkd.use_backend(name):
            await asyncio.sleep(0.01)
            return backends.current()

    async def both():
        return await asyncio.gather(*map(task, ("reference", "cpp", "triton")))

    assert asyncio.run(both()) == ["reference", "cpp", "triton"]


def _started(by_python, function):
    """The result of ``function()``, which runs in a thread that Python has started, or has not."""
    result: Future = Future()

    def run():
        try:
            result.set_result(function())
        except BaseException as e:
            result.set_exception(e)

    if by_python:
        threading.Thread(target=run).start()
    else:
        _thread.start_new_thread(run, ())
    return result


@pytest.mark.parametrize("by_python", [True, False])
@pytest.mark.parametrize("autograds", [True, False])
def test_threads_leave_use_backend_in_any_order(by_python, autograds):
    """As the recomputations of checkpointed blocks on two GPUs do, in autograd's threads."""
    outside = backends.current()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def run(name, others_in, mine_in, wait_for, mine_out):
        before = backends.current()
        assert others_in is None or others_in.wait(60)
        with fastkd.use_backend(name):
            mine_in.set()
            assert wait_for.wait(60)
            inside = backends.current(), _in_force.traced
        mine_out.set()
        return before, *inside, backends.current()

    def started(name, around, *events):
        def call():
            with fastkd.use_backend(around):
                return _in_autograds_own_thread(lambda: run(name, *events))

        return _started(by_python, call if autograds else lambda: run(name, *events))

    first = started("reference", "triton", None, first_in, second_in, first_out)
    second = started("cpp", "auto", first_in, second_in, first_out, threading.Event())
    before, after = ("triton", "auto") if autograds and FROM_EVERY_THREAD else (outside, outside)
    assert first.result(60) == (before, "reference", "cpp", before)
    assert second.result(60) == (after, "cpp", "cpp", after)
    assert (backends.current(), _in_force.traced) == (outside, outside)
    assert _started(False, backends.current).result(60) == outside
    assert _in_autograds_own_thread(backends.current) == outside


@pytest.mark.parametrize("by_python", [True, False])
def test_a_backward_pass_begun_outside_takes_nothing_of_another_threads_use_backend(by_python):
    outside = backends.current()
    with fastkd.use_backend("triton"):
        assert _started(by_python, backends.current).result(60) == outside
        found = _started(by_python, lambda: _in_autograds_own_thread(backends.current)).result(60)
    assert found == outside


def test_a_backward_pass_begun_inside_takes_nothing_of_another_threads_use_backend():
    entered, done = threading.Event(), threading.Event()

    def other():
        with fastkd.use_backend("triton"):
            entered.set()
            done.wait(60)

    with fastkd.use_backend("reference"):
        _started(True, other)
        assert entered.wait(60)
        found = _in_autograds_own_thread(backends.current)
        done.set()
    assert found == "reference"


@pytest.mark.skipif(not FROM_EVERY_THREAD, reason="PyTorch before 2.13")
def test_a_backward_pass_begun_in_one_of_autograds_threads_takes_what_was_entered_there():
    def call():
        with fastkd.use_backend("auto"):
            inside = _in_autograds_own_thread(backends.current)
        return inside, _in_autograds_own_thread(backends.current)

    with fastkd.use_backend("triton"):
        assert _in_autograds_own_thread(call) == ("auto", "triton")


@pytest.mark.parametrize("by_python", [True, False])
def test_async_tasks_leave_use_backend_in_any_order(by_python):
    async def task(name, rounds):
        with fastkd.use_backend(name):
            for _ in range(rounds):
                await asyncio.sleep(0)
            return backends.current()

    async def both():
        with fastkd.use_backend("reference"):
            inherits = asyncio.create_task(task("auto", 6))  # and is left behind
        found = await asyncio.gather(task("triton", 2), task("cpp", 4))
        between = backends.current()
        return [*found, await inherits, between, backends.current()]

    def run():
        found = asyncio.run(both())
        return found, backends.current(), _in_force.traced, _in_autograds_own_thread(backends.current)

    outside = backends.current()
    found, *after = _started(by_python, run).result(60)
    assert found == ["triton", "cpp", "auto", outside, outside]
    assert after == [outside] * 3


def test_a_thread_keeps_nothing_of_what_it_has_left():
    """PyTorch gives up what a thread keeps when the thread ends, by the interpreter's lock. That aborts the
    process where the interpreter ends just then.
    """

    def run():
        with fastkd.use_backend("reference"), fastkd.use_backend("auto"):
            pass
        return torch._C._is_key_in_tls("fastkd_backend")

    assert not _started(True, run).result(60)


def test_entering_and_leaving_keeps_no_memory():
    """Before PyTorch 2.13 fastkd takes the reference that PyTorch gives up, one for each."""

    def enter():
        with fastkd.use_backend("reference"), fastkd.use_backend("auto"):
            _in_force.here()

    for _ in range(10):
        enter()
    tracemalloc.start()
    try:
        gc.collect()  # which also empties Python's list of free tuples
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            enter()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200 * sys.getsizeof(())
