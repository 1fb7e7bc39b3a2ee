"""``channel_dim=-1``: channels-last views and tokens give what their (N, C, *S) views give, not copied."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from support import values

import fastkd
from fastkd import reference
from fastkd.ops._grad_prefetch import GradPrefetch

F64 = torch.float64
MAPS, TOKENS = (3, 8, 8, 5), (3, 49, 5)  # (N, H, W, C) and (N, L, C)
MARGINS = torch.tensor([-0.1, -0.5, 0.0, -1.0, -0.2], dtype=F64)


def single(name):
    return lambda module, x, y, **options: getattr(module, name)(x, **options).square().sum() + 0 * y.sum()


def pair(name, *rest, several=True):
    def call(module, x, y, **options):
        sides = ([x, 2 * x], (y, y)) if several else (x, y)
        return getattr(module, name)(*sides, *rest, **options).square().sum()

    return call


LOSSES = {
    "attention_map": (single("attention_map"), (MAPS, TOKENS)),
    "attention_transfer_loss": (pair("attention_transfer_loss"), (MAPS, TOKENS)),
    "fsp_matrix": (pair("fsp_matrix", several=False), (MAPS, TOKENS)),
    "fsp_loss": (pair("fsp_loss"), (MAPS, TOKENS)),
    "ofd_loss": (pair("ofd_loss", [MARGINS, MARGINS]), (MAPS, TOKENS)),
    "hcl_loss": (pair("hcl_loss"), (MAPS,)),
    "sakd_map": (single("sakd_map"), (MAPS,)),
    "sakd_loss": (pair("sakd_loss"), (MAPS,)),
}
CASES = [(name, shape) for name, (_, shapes) in LOSSES.items() for shape in shapes]


@pytest.mark.parametrize("module", [fastkd, reference], ids=["ops", "reference"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_values_and_gradients_are_those_of_the_view(module, name, shape):
    call = LOSSES[name][0]
    leaves = [values(shape, F64).requires_grad_() for _ in range(2)]
    found = call(module, *leaves, channel_dim=-1)
    wanted = call(module, *(x.movedim(-1, 1) for x in leaves))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, leaves) for loss in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert grads[0][0].shape == shape and grads[0][0].any()


def test_a_module_takes_it_too():
    x, y = values(MAPS, F64), values(MAPS, F64)
    modules = {
        "attention_transfer_loss": fastkd.AttentionTransfer,
        "fsp_loss": fastkd.FSP,
        "hcl_loss": fastkd.HCL,
        "sakd_loss": fastkd.SAKD,
    }
    for name, kind in modules.items():
        wanted = getattr(fastkd, name)([x, x], [y, 2 * y], channel_dim=-1)
        assert torch.equal(kind(channel_dim=-1, weight=kind().weight)([x, x], [y, 2 * y]), wanted)
    found = fastkd.OFD(MARGINS, channel_dim=-1)(x, y)
    assert torch.equal(found, fastkd.ofd_loss(x, y, MARGINS, channel_dim=-1))


def test_maps_have_no_channels():
    x, y = values(MAPS, F64), values(MAPS, F64)
    maps = fastkd.attention_map(y, channel_dim=-1)
    assert maps.shape == (3, 8, 8)
    for module in (fastkd, reference):
        wanted = module.attention_transfer_loss(x, y, channel_dim=-1)
        found = module.attention_transfer_loss(x, maps, teacher_is_map=True, channel_dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        found = module.attention_transfer_loss(maps, x, student_is_map=True, channel_dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


# of what is large the loss itself, without the products of the tests above
PLAIN = {
    "attention_map": lambda x, y, **o: fastkd.attention_map(x, **o).sum(),
    "attention_transfer_loss": fastkd.attention_transfer_loss,
    "fsp_matrix": lambda x, y, **o: fastkd.fsp_matrix(x, y, **o).sum(),
    "fsp_loss": lambda x, y, **o: fastkd.fsp_loss([x, x], [y, y], **o),
    "ofd_loss": lambda x, y, **o: fastkd.ofd_loss(x, y, torch.full((x.shape[-1],), -0.5), **o),
    "hcl_loss": fastkd.hcl_loss,
    "sakd_map": lambda x, y, **o: fastkd.sakd_map(x, **o).sum(),
    "sakd_loss": fastkd.sakd_loss,
}


def peak_of(call):
    """The most that PyTorch's allocator held at once for it, in bytes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_nothing_is_copied(cpp, one_thread, monkeypatch, name, shape):
    # what other tests' backward passes were given says nothing of this one's
    monkeypatch.setattr(GradPrefetch, "expect", lambda self: ((0, 1.0), 1.0))
    channels = 16 if name.startswith("fsp") else 384  # of few channels the matrix is small
    side = 14 * 14 * 384 // channels
    sizes = (side,) if shape == TOKENS else (14, side // 14)
    x, y = (torch.randn(16, *sizes, channels) for _ in range(2))
    size = x.numel() * 4
    with fastkd.use_backend(cpp):
        with torch.no_grad():
            assert 0 < peak_of(lambda: PLAIN[name](x, y, channel_dim=-1)) < size / 2
        x.requires_grad_()  # whose gradient is all that is as large
        peak = peak_of(lambda: PLAIN[name](x, y, channel_dim=-1).backward())
        assert x.grad.stride() == x.stride() and x.grad.any()
        allowed = 3 if name == "fsp_loss" else 1  # there x comes twice: two gradients and their sum
        assert allowed * size <= peak < (allowed + 0.5) * size


@pytest.mark.parametrize("module", [fastkd, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0, 2, "last", None, True, 1.0, np.True_, np.float32(1)], ids=repr)
def test_another_dimension_is_one_line(module, name, value):
    x, y = values(MAPS, F64), values(MAPS, F64)
    with pytest.raises(
        ValueError, match=re.escape(f"channel_dim is {value!r}, wanted 1 or, for the last dimension, -1")
    ):
        LOSSES[name][0](module, x, y, channel_dim=value)


@pytest.mark.parametrize("module", [fastkd, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_dimension_may_be_numpys_number(module, name):
    x, y = values(MAPS, F64), values(MAPS, F64)
    one, other = (LOSSES[name][0](module, x, y, channel_dim=kind(-1)) for kind in (int, np.int64))
    assert torch.equal(one, other)


def test_what_is_no_feature_is_named_as_ever():
    with pytest.raises(TypeError, match=r"student\[1\] is str, wanted a tensor"):
        fastkd.attention_transfer_loss([torch.ones(MAPS), "x"], [torch.ones(MAPS)] * 2, channel_dim=-1)
    with pytest.raises(ValueError, match=r"x is \(5,\).*wanted \(N, C, \*S\)"):
        fastkd.attention_map(torch.ones(5), channel_dim=-1)
    for value in (3, True):
        with pytest.raises(ValueError, match=f"channel_dim is {value}"):
            fastkd.FSP(channel_dim=value)


@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_has_the_same_arguments(name):
    ours, ref = (inspect.signature(getattr(module, name)).parameters for module in (fastkd, reference))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in ref.values()
    ]
    assert ours["channel_dim"].default == 1


def test_it_is_one_graph():
    x, y = torch.randn(MAPS), torch.randn(MAPS)
    for name, (call, _) in LOSSES.items():
        if name == "ofd_loss":
            continue
        compiled = torch.compile(
            lambda x, y, call=call: call(fastkd, x, y, channel_dim=-1), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x, y), call(fastkd, x, y, channel_dim=-1), rtol=1e-4, atol=1e-6)
