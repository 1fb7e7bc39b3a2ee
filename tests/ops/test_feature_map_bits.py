"""The taps give the same bits, between runs, threads and code paths."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from child_process import python
from support import DENSE, make

import fastkd
from fastkd import native

pytestmark = pytest.mark.usefixtures("one_thread")


def test_results_agree_to_the_bit_between_runs_and_thread_counts():
    x, r, grad = (make((6, 33, 17, 19), torch.float32, random.choice(DENSE)) for _ in range(3))
    map_grad = torch.randn(6, 17, 19)
    seen = []
    for threads in (1, 3, 1):
        torch.set_num_threads(threads)
        for function, inputs in (("tap", (x,)), ("relu_tap", (x, r))):
            leaves = [v.detach().requires_grad_() for v in inputs]
            outputs = getattr(fastkd, function)(*leaves)
            seen.append(
                [v.detach() for v in (*outputs, *torch.autograd.grad(outputs, leaves, (grad, map_grad)))]
            )
    for other in seen[2:4], seen[4:]:
        assert all(torch.equal(a, b) for first, second in zip(seen[:2], other) for a, b in zip(first, second))


def test_relu_tap_makes_the_map_of_its_result_to_the_bit():
    """In place, both sum the same numbers in the same order, whatever the pieces."""
    for shape, layout in itertools.product(
        [(2, 33, 13, 13), (1, 300, 7, 9), (2, 5, 70, 70)], ["contiguous", "channels_last"]
    ):
        y, attention = fastkd.relu_tap(make(shape, torch.float32, layout))
        assert torch.equal(attention, fastkd.attention_map(y))


@pytest.mark.parametrize("path", native.CPU_PATHS)
def test_every_code_path_gives_the_same_answers(path):
    """The grid above runs on the path in force; here each is forced, in a process of its own."""
    if not native.CPU.available or path not in native.cpu_paths():
        pytest.skip(f"no {path} here: {native.CPU.reason}")
    code = """
import sys, torch, fastkd
torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(1)
for dtype, tolerance in dict(float16=1e-2, bfloat16=5e-2, float32=1e-5, float64=1e-12).items():
    dtype = getattr(torch, dtype)
    for shape in ((2, 33, 7, 7), (1, 3, 5, 4), (1, 5, 2, 3)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x, r, g = (torch.randn(shape, dtype=dtype).to(memory_format=memory) for _ in range(3))
            for p in (2.0, 3.0, 2.7):
                both = []
                for m in (fastkd, fastkd.reference):
                    a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
                    t, q = m.tap(a, p)
                    y, k = m.relu_tap(t, b, p)
                    w = torch.linspace(-3, 5, k.numel()).view_as(k).to(k.dtype)
                    both.append([t, q, y, k, *torch.autograd.grad((y, q, k), (a, b), (g, w, w))])
                for got, want in zip(*both):
                    absolute = tolerance * max(1, want.abs().max().item())
                    torch.testing.assert_close(got, want, rtol=tolerance, atol=absolute)
"""
    done = python(code, random.randrange(2**31), FASTKD_CPU=path, FASTKD_BACKEND="cpp")
    assert done.returncode == 0, done.stderr
