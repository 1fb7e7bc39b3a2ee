"""The power map of a feature with its mean over space: values, gradients, and what they may not do."""

from __future__ import annotations

import pytest
import torch
from recorder import Recorder

import fastkd
from fastkd.ops.pooled import pooled_map

SHAPES = [(2, 5, 8, 8), (1, 37, 7, 7), (3, 16, 32, 33), (2, 8, 1, 1), (1, 1, 3, 5), (2, 9, 2, 20)]


def gradients(x, upstreams, which=(0, 1)):
    leaf = x.detach().requires_grad_()
    found = pooled_map(leaf)
    grads = [upstreams[i].to(found[i].dtype) for i in which]
    return [*found, *torch.autograd.grad([found[i] for i in which], leaf, grads)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels-last"])
def test_both_match_float64_on_every_code_path(each_path, dtype, last):
    cases = []
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
        # of a sum that ends in a permutation: they are not contiguous
        upstreams = torch.randn(*shape[2:], shape[0]).movedim(-1, 0), torch.randn(shape[1], shape[0]).T
        cases += [(x, upstreams, which) for which in ((0, 1), (0,), (1,))]
    exact = [gradients(x.double(), *rest) for x, *rest in cases]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for _ in each_path:
        for (x, *rest), wanted in zip(cases, exact, strict=True):
            with Recorder() as ran:
                found = gradients(x, *rest)
            assert ran.fused and [y.dtype for y in found] == [torch.float32, torch.float32, dtype]
            assert found[2].stride() == torch.empty_like(x).stride()
            for got, want, limit in zip(found, wanted, (2e-6, 2e-6, tolerance), strict=True):
                torch.testing.assert_close(got.double(), want, rtol=limit, atol=1e-6)


@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels-last"])
def test_an_infinity_stays_out_of_the_gradient_of_the_means(each_path, last):
    """Nothing arrives for the map, whose gradient alone multiplies the feature's numbers."""
    x = torch.randn(2, 5, 7, 9)
    x[0, 1, 2, 3], x[1, 4, 6, 8] = float("inf"), float("nan")  # in a vector, and in what is left
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    upstream = torch.randn(2, 5)
    for _ in each_path:
        dx = gradients(x, (None, upstream), (1,))[2]
        torch.testing.assert_close(dx, (upstream / 63)[..., None, None].expand_as(x))


def test_bits_do_not_depend_on_threads(each_path):
    x, upstreams, threads = torch.randn(7, 37, 9, 9), (torch.randn(7, 9, 9), torch.randn(7, 37)), 3
    before = torch.get_num_threads()
    for _ in each_path:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(gradients(x, upstreams))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_it_does_not_take_and_what_it_refuses(cpp):
    x = torch.randn(2, 5, 8, 8)
    for given in (x.double(), x.transpose(2, 3), x[..., ::2], x[:1].expand(2, -1, -1, -1)):
        with Recorder() as ran:
            found = pooled_map(given)
        assert not ran.fused
        torch.testing.assert_close(found, (given.square().mean(1), given.mean((2, 3))))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(pooled_map(leaf)[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative|twice|fastkd"):
        grad.sum().backward()
    ops = torch.ops.fastkd
    for call, words in (
        (lambda: ops.pooled_map(x.double()), "x must be float16, bfloat16 or float32"),
        (lambda: ops.pooled_map(x.transpose(2, 3)), "x must be dense"),
        (lambda: ops.pooled_map_backward(x[:, 0], None, x), "map_grad must be contiguous"),
        (lambda: ops.pooled_map_backward(torch.zeros(2, 8, 7), None, x), "map_grad must be float32"),
        (lambda: ops.pooled_map_backward(None, torch.zeros(2, 5).double(), x), "mean_grad must be float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    torch.library.opcheck(ops.pooled_map, (x,), test_utils=("test_schema", "test_faketensor"))
    upstreams = torch.randn(2, 8, 8), torch.randn(2, 5)
    torch.library.opcheck(
        ops.pooled_map_backward, (*upstreams, x), test_utils=("test_schema", "test_faketensor")
    )
    with fastkd.use_backend("cpp"):
        compiled = torch.compile(pooled_map, fullgraph=True, backend="aot_eager")
        sum(y.sum() for y in compiled(leaf)).backward()
    torch.testing.assert_close(leaf.grad, 2 / 5 * x + 1 / 64)
