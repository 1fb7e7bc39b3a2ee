"""Sums over channels are as exact as plain PyTorch's in float32, however many channels there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from support import KERNELS, arrange, place, ref
from torch import Tensor

import fastkd
from fastkd import native

SEEDS = 20
ALLOWED = 1.25
Function = Callable[..., Tensor]
Runner = Callable[..., list[Tensor]]


@pytest.fixture
def cpu_path(cpp):
    """The code path may be changed by the test, and is then as it was."""
    before = native.cpu_path()
    yield
    native.set_cpu_path(before)


def features(channels: int, size: int, layout: str, dtype: torch.dtype, seeds: int = SEEDS) -> list[Tensor]:
    """Two of (seeds, channels, size, size); sample n is the n-th seed's."""
    samples = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        samples.append(torch.randn(2, channels, size, size))
    return [arrange(x.to(dtype), layout) for x in torch.stack(samples, 1)]


def results(fn: Function, tensors: Sequence[Tensor], gradients: bool = True) -> list[Tensor]:
    """What fn returns, and its gradients for an upstream gradient that is the same in every call."""
    leaves = [x.detach().requires_grad_(gradients) for x in tensors]
    out = fn(*leaves)
    if not gradients:
        return [out]
    upstream = torch.cos(torch.arange(out.numel())).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def by_seed(fn: Function, tensors: Sequence[Tensor], gradients: bool = True) -> list[Tensor]:
    """The same for each sample alone, joined."""
    alone = [results(fn, [x[n : n + 1] for x in tensors], gradients) for n in range(len(tensors[0]))]
    return [torch.cat([x.view(1) if x.dim() == 0 else x for x in every]) for every in zip(*alone)]


def rms_errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """Of each result: the root mean square, over the seeds, of the largest error as a part of the largest
    number.
    """
    errors = []
    for a, b in zip(got, exact, strict=True):
        wrong, largest = (x.flatten().view(len(b), -1).abs().amax(1) for x in (a.double().cpu() - b, b))
        errors.append((wrong / largest).square().mean().sqrt())
    return torch.stack(errors)


def check(
    run: Runner,
    name: str,
    call: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    backend: str = "cpp",
    **options: bool,
):
    """Our errors against those of plain PyTorch in float32, for the same numbers in the same layout.

    Both are taken against float64. Backend "cpp" takes each of its code paths. ``call(function, *tensors)``
    calls fastkd's function of that name, or the reference's.
    """
    ours, plain = (functools.partial(call, getattr(module, name)) for module in (fastkd, ref))
    exact = run(plain, [x.double() for x in tensors], **options)
    rough = rms_errors(run(plain, [x.float() for x in tensors], **options), exact)
    for path in native.cpu_paths() if backend == "cpp" else ("",):
        if path:
            native.set_cpu_path(path)
        with fastkd.use_backend(backend):
            mine = rms_errors(run(ours, [place(x, backend) for x in tensors], **options), exact)
        ratios = [round(ratio, 2) for ratio in (mine / rough).tolist()]
        what = f"{name} of {tuple(tensors[0].shape)} {path}"
        assert max(ratios) <= ALLOWED, f"{what}: {ratios} times the errors of PyTorch"


def check_maps(tensors: Sequence[Tensor], p: float, backend: str = "cpp", **options: bool):
    check(results, "attention_map", lambda f, x: f(x, p), tensors[:1], backend, **options)
    check(results, "relu_tap", lambda f, x, r: f(x, r, p)[1], tensors, backend, **options)


def check_loss(tensors: Sequence[Tensor], p: float, backend: str = "cpp", **options: bool):
    check(by_seed, "attention_transfer_loss", lambda f, s, t: f(s, t, p), tensors, backend, **options)


# 49 positions are vectors and a rest, 9 may be fewer than a vector has lanes
@pytest.mark.parametrize(
    "layout, size", [("contiguous", 7), ("channels_last", 7), ("stepped", 7), ("contiguous", 3)]
)
# of 128 and 512 on, the blocks of channels are larger
@pytest.mark.parametrize("channels", [16, 64, 128, 512, 4096])
def test_cpp_is_as_exact_as_pytorch(cpu_path, channels, layout, size):
    tensors = features(channels, size, layout, torch.float32)
    check_maps(tensors, 2.0)
    check_loss(tensors, 2.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cpp_is_as_exact_as_pytorch_for_large_maps(cpu_path, layout):
    """More positions than the kernels take at a time."""
    check_maps(features(128, 48, layout, torch.float32, 3), 2.0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.7, 3.0])
@pytest.mark.parametrize("channels", [16, 600])
def test_other_powers_are_as_exact_as_pytorch(cpu_path, channels, p):
    for layout in ("contiguous", "channels_last"):
        tensors = features(channels, 7, layout, torch.float32)
        check_maps(tensors, p)
        check_loss(tensors, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 64, 2048])
def test_half_precision_is_summed_as_exactly_as_pytorch_sums_float32(cpu_path, channels, dtype):
    for layout in ("contiguous", "channels_last", "stepped"):
        tensors = features(channels, 7, layout, dtype)
        check(results, "attention_map", lambda f, x: f(x), tensors[:1], gradients=False)
        check(results, "relu_tap", lambda f, x: f(x)[1], tensors[:1], gradients=False)
        check_loss(tensors, 2.0, gradients=False)


@pytest.mark.parametrize("pool", ["before", "after"])
@pytest.mark.parametrize("channels", [16, 1024])
def test_pooled_features_are_as_exact_as_pytorch(cpu_path, channels, pool):
    tensors = [features(channels, size, "contiguous", torch.float32)[0] for size in (8, 4)]
    check(by_seed, "attention_transfer_loss", lambda f, s, t: f(s, t, pool=pool), tensors)


GPU = [param for param in KERNELS if param.values[0] != "cpp"]
TRITON = [param for param in KERNELS if param.values[0] == "triton"]


@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_gpu_kernels_are_as_exact_as_pytorch(backend, layout):
    for channels, seeds in ((16, SEEDS), (160, 5)):
        check_maps(features(channels, 7, layout, torch.float32, seeds), 2.0, backend)


# interpreted and emulated kernels take long: few seeds, and no values of the loss, which are too few then
@pytest.mark.parametrize("backend", GPU)
def test_gpu_kernels_of_many_channels_are_as_exact_as_pytorch(backend):
    tensors = features(2048, 7, "contiguous", torch.float32, 3)
    check(by_seed, "attention_map", lambda f, x: f(x), tensors[:1], backend)
    check(results, "relu_tap", lambda f, x, r: f(x, r)[1], [x[:1] for x in tensors], backend)


@pytest.mark.parametrize("backend", GPU)
def test_gpu_kernels_of_losses_are_as_exact_as_pytorch(backend):
    check_loss(features(128, 7, "contiguous", torch.float32, 10), 2.0, backend)


@pytest.mark.parametrize("backend", GPU)
def test_gpu_kernels_of_small_maps_are_as_exact_as_pytorch(backend):
    """The fewer positions there are, the more of a block's threads share one."""
    for size in (1, 2, 4):
        x = features(1024, size, "contiguous", torch.float32)[:1]
        check(results, "attention_map", lambda f, x: f(x, normalize=False), x, backend)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
def test_triton_is_as_exact_as_pytorch(backend, layout):
    for channels, seeds in ((64, SEEDS), (512, 5), (4096, 3)):
        check_maps(features(channels, 7, layout, torch.float32, seeds), 2.0, backend)


# tiles of 4, 8 and 64 rows
@pytest.mark.parametrize(
    "layout, channels, size", [("contiguous", 256, 32), ("contiguous", 4096, 7), ("stepped", 4096, 7)]
)
@pytest.mark.parametrize("backend", TRITON)
def test_triton_is_as_exact_where_a_lane_adds_the_most_rows(backend, layout, channels, size, monkeypatch):
    """As in a large batch, where each program sums all it may: 64 rows a lane."""
    pytest.importorskip("triton")
    from fastkd.kernels.attention import map as attention_map
    from fastkd.kernels.common import launch

    monkeypatch.setattr(launch, "LEAST", launch.MOST)
    monkeypatch.setattr(attention_map, "_plans", launch.Plans())
    (x,) = features(channels, size, layout, torch.bfloat16, 3)[:1]
    cut = launch.grid(launch.matrix_view(x.shape, [x.stride()], x.element_size()), launch.MOST)
    assert cut.steps == 64
    check(results, "attention_map", lambda f, x: f(x), [x], backend, gradients=False)
