"""The batch norm of the networks against PyTorch's in float64, with its gradients, its averages and what it
leaves to PyTorch.
"""

from __future__ import annotations

import copy

import pytest
import torch
from norm_cases import DTYPES, compiled, every_path, feature, norms
from recorder import Recorder
from torch import nn

import fastkd
from fastkd import native, reference
from fastkd.ops.batch_norm import batch_norm

SHAPES = [
    (8, 16, 9, 7),
    (2, 3, 5, 4),
    (6, 100, 6, 6),
    (3, 80, 2, 1),
    (5, 1, 4, 4),
    (7, 16, 13, 12),
    (1, 33, 3, 3),
    (9, 64, 1, 1),
    (2, 9000, 2, 1),
]
switches = pytest.mark.parametrize(
    ("residual", "relu"), [(False, False), (False, True), (True, False), (True, True)]
)


@pytest.fixture(autouse=True)
def by_the_kernels():
    """Whatever FASTKD_BACKEND says: what is tested here is when they serve, and what they answer. The code
    path is left as it was.
    """
    if not native.CPU.available:
        yield
        return
    before = native.cpu_path()
    with fastkd.use_backend("cpp"):
        yield
    native.set_cpu_path(before)


def answers(norm, x, residual, relu, grad, ref=None):
    """y, the gradients of x, residual, weight and bias, and both averages."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual) if t is not None]
    x, residual = leaves[0], leaves[1] if len(leaves) > 1 else None
    if ref is None:
        y = batch_norm(norm, x, residual, relu=relu)
    else:
        y = norm(x) if residual is None else norm(x) + residual
        # float64 and the kernel may differ on which side of 0 a number lies: the kernel's side is taken,
        # which was compared before
        y = y * (ref > 0) if relu else y
    gradients = torch.autograd.grad(y, [*leaves, norm.weight, norm.bias], grad)
    return [y, *gradients, norm.running_mean, norm.running_var]


@compiled
@switches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_matches_the_reference_on_every_code_path(shape, dtype, residual, relu):
    norm, exact = norms(shape[1])
    x, grad = feature(shape, dtype), feature(shape, dtype)
    added = feature(shape, dtype) if residual else None
    wide = [t.double() if t is not None else None for t in (x, added)]
    plain = copy.deepcopy(exact)(wide[0]) + (0 if added is None else wide[1])
    clear = plain.abs() > 2e-6 * plain.abs().max()
    for _ in every_path():
        with Recorder() as recorder:
            ours = answers(copy.deepcopy(norm), x, added, relu, grad)
        assert recorder.fused.count("batch_norm") == recorder.fused.count("batch_norm_backward") == 1
        assert not relu or torch.equal((ours[0] > 0) & clear, (plain > 0) & clear)
        compare(ours, answers(copy.deepcopy(exact), *wide, relu, grad.double(), ref=ours[0]), dtype)


def compare(ours, ref, dtype):
    rows = ref[0].numel() // ref[0].shape[1]
    grad_size = max(1.0, ref[1].abs().max().item())
    for i, (found, wanted) in enumerate(zip(ours, ref, strict=True)):
        own = torch.finfo(dtype).eps if found.dtype == dtype != torch.float32 else 0.0
        size = wanted.abs().max().item()
        # sums over the rows, whose terms have both signs, are held to the size of the terms
        if found.dim() == 1 and i < len(ref) - 2:
            size += grad_size * rows**0.5
        # a variance of two numbers that lie near each other makes a slope without bound
        steep = 1 if rows > 4 else 100
        least = 2.0**-25 if dtype == torch.float16 and own else 0.0  # half of a subnormal's last place
        torch.testing.assert_close(
            found.double(), wanted, rtol=own, atol=4e-6 * steep * size + least, msg=lambda m, i=i: f"{i}: {m}"
        )


@compiled
def test_a_mean_far_from_zero_costs_no_digits_and_chunks_are_joined():
    shape = (64, 16, 32, 32)
    x = feature(shape, scale=1.0, shift=3000.0)
    norm, exact = norms(16)
    y, ref = batch_norm(norm, x), exact(x.double())
    assert (y.double() - ref).abs().max() < 3e-3  # 3000 in float32 is known to 1e-4
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=1e-5, atol=0)
    plain = nn.BatchNorm2d(16, momentum=0.3)
    plain(x)
    # no worse than PyTorch's
    assert (norm.running_var.double() - exact.running_var).abs().max() <= 2 * (
        plain.running_var.double() - exact.running_var
    ).abs().max() + 1e-5


@compiled
@switches
def test_results_do_not_depend_on_threads(set_threads, residual, relu):
    x, grad, added = (
        feature((32, 24, 20, 20)),
        feature((32, 24, 20, 20)),
        feature((32, 24, 20, 20)) if residual else None,
    )
    norm, _ = norms(24)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(answers(copy.deepcopy(norm), x, added, relu, grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@compiled
def test_what_is_not_a_number_stays_so():
    for bad in (float("nan"), float("inf")):
        x = feature((4, 16, 5, 5))
        x[1, 3, 2, 2] = bad
        norm, _ = norms(16)
        y = batch_norm(norm, x, relu=True)
        assert y[:, 3].isnan().all() and not y[:, :3].isnan().any() and not y[:, 4:].isnan().any()
        assert norm.running_var[3].isnan() and not norm.running_var[4].isnan()


@compiled
@pytest.mark.parametrize(("residual", "relu"), [(True, True), (False, True), (True, False)])
def test_it_is_differentiable_twice(residual, relu):
    x, added = feature((4, 8, 3, 3)), feature((4, 8, 3, 3))
    norm, exact = norms(8)

    def penalty(norm, function, x, added):
        leaves = [x.detach().clone().requires_grad_(), added.detach().clone().requires_grad_()]
        y = function(norm, leaves[0], leaves[1] if residual else None)
        grads = torch.autograd.grad(y.square().sum(), [leaves[0], norm.weight], create_graph=True)
        return torch.autograd.grad(
            sum(g.square().sum() for g in grads), [leaves[0], norm.weight, *([leaves[1]] if residual else [])]
        )

    ours = penalty(norm, lambda norm, x, r: batch_norm(norm, x, r, relu=relu), x, added)
    ref = penalty(
        exact,
        lambda n, x, r: reference.batch_norm(x, r, n.weight, n.bias, relu=relu),
        x.double(),
        added.double(),
    )
    for found, wanted in zip(ours, ref, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
