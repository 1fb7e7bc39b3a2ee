"""NORM's kernel against the formula in float64, on every code path."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder

from fastkd import native
from fastkd.ops.norm import norm_loss

SIZES = ((2, 5, 3, 8, 8), (3, 2, 4, 7, 5), (1, 33, 2, 1, 1), (40, 16, 8, 3, 4))  # N, C, copies, H, W


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels-last"])
def test_loss_and_gradient_match_float64_on_every_code_path(each_path, set_threads, dtype, last):
    """With an upstream gradient that is not 1, and the same bits by any number of threads."""
    layout = torch.channels_last if last else torch.contiguous_format
    cases = []
    for n, width, copies, *size in SIZES:
        u, target = (
            torch.randn(n, c, *size).to(dtype, memory_format=layout) for c in (copies * width, width)
        )
        apart = u.double() - target.double().repeat(1, copies, 1, 1)
        wanted = copies * apart.square().mean(), 3 * copies * 2 * apart / apart.numel()
        cases.append((u, target, copies, wanted))
    rounding = torch.finfo(dtype).eps
    for _ in each_path:
        for u, target, copies, (exact, slopes) in cases:
            results = []
            for count in (1, 3):
                set_threads(count)
                leaf = u.clone().requires_grad_()
                with Recorder() as ran:
                    loss = norm_loss(leaf, target, copies)
                    (loss * 3).backward()
                assert ran.fused == ["norm_loss"]
                results.append((loss.detach(), leaf.grad))
            assert all(map(torch.equal, *results))
            loss, grad = results[0]
            torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
            # next to zero float16 has steps of 6e-8
            torch.testing.assert_close(grad.double(), slopes, rtol=4 * rounding, atol=1e-7)


@pytest.mark.parametrize("shape", [(9, 64, 16, 16), (3, 37, 61, 13)], ids=["whole lines", "others"])
def test_every_way_through_memory_gives_the_same_bits(each_path, memory_plan, shape):
    """Gradients of more than 1 MiB, for which the ways differ; samples begin a line of the cache or not."""
    n, width, *size = shape
    u, target = torch.randn(n, 4 * width, *size, requires_grad=True), torch.randn(shape)
    found = []
    for _ in each_path:
        for plan in native.MEMORY_PLANS:
            memory_plan(plan)
            u.grad = None
            norm_loss(u, target, 4).backward()
            found.append(u.grad)
            apart = u.detach().double() - target.double().repeat(1, 4, 1, 1)
            torch.testing.assert_close(u.grad.double(), 8 * apart / u.numel(), rtol=1e-6, atol=1e-12)
    assert all(torch.equal(grad, found[0]) for grad in found)
