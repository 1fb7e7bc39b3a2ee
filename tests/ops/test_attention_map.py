"""attention_map: C++ and Triton kernels against the reference in float64, and its gradients."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from attention_cases import POWERS, SHAPES, kind
from recorder import fused_only
from support import (
    KERNEL_DTYPES,
    KERNEL_SAMPLES,
    KERNELS,
    LAYOUTS,
    check,
    drawn,
    dtypes,
    evaluate,
    fetched,
    make,
    name,
    place,
    ref,
    some_shape,
)

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")


def map_check(backend, x, *, upstream=None, **switches):
    y = ref.attention_map(x.detach(), **switches)
    upstream = torch.randn_like(y) if upstream is None else upstream
    return check(
        backend,
        lambda x: fastkd.attention_map(x, **switches),
        lambda x: ref.attention_map(x, **switches),
        [x],
        upstream=upstream,
    )


@pytest.mark.parametrize(
    "p, signed, channel_reduce", list(itertools.product(POWERS, [False, True], ["mean", "sum"]))
)
@pytest.mark.parametrize("backend, dtype", KERNEL_SAMPLES)
def test_map_matches_the_reference_for_every_switch(backend, dtype, p, signed, channel_reduce):
    dtype = drawn(backend, dtype)
    normalize, eps_mode = random.choice([(True, "clamp"), (True, "add"), (False, "clamp")])
    x = make(some_shape(), dtype, random.choice(LAYOUTS), kind(p, signed))
    eps = random.choice((1e-12, 1e-6, 0.5))
    map_check(
        backend,
        x,
        p=p,
        signed=signed,
        channel_reduce=channel_reduce,
        normalize=normalize,
        eps=eps,
        eps_mode=eps_mode,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("backend", KERNELS)
def test_map_matches_the_reference_in_every_layout(backend, shape, layout):
    map_check(backend, make(shape, random.choice(dtypes(backend)), layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stepped"])
@pytest.mark.parametrize("upstream", ["expanded", "transposed", "stepped", "channels_last"])
@pytest.mark.parametrize("backend", KERNELS)
def test_map_takes_incoming_gradients_of_any_strides(backend, upstream, layout):
    x = make((2, 5, 6, 7), torch.float32, layout)
    grads = {
        "expanded": torch.randn(1, 1, 1).expand(2, 6, 7),
        "transposed": torch.randn(2, 7, 6).transpose(1, 2),
        "stepped": torch.randn(4, 6, 14)[::2, :, ::2],
        "channels_last": torch.randn(6, 7, 2).permute(2, 0, 1),
    }
    map_check(backend, x, upstream=grads[upstream])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1, 1), (2, 33, 1, 1, 1)], ids=name)
@pytest.mark.parametrize("backend, dtype", KERNEL_DTYPES)
def test_a_lone_position_has_map_one_and_gradient_zero(backend, dtype, shape):
    x = make(shape, dtype, random.choice(LAYOUTS), "positive")
    upstream = torch.ones(shape[0], *shape[2:])
    with fastkd.use_backend(backend), fused_only(backend=backend):
        got = fetched(evaluate(fastkd.attention_map, [place(x, backend)], upstream=place(upstream, backend)))
    assert ((got.output - 1).abs() <= 1e-15).all()
    assert got.grads[0].abs().max().item() < 1e-12


@pytest.mark.parametrize("backend", KERNELS)
def test_a_norm_beside_eps_takes_eagers_side_of_the_clamp(backend):
    x, upstream = torch.ones(1, 1, 4), torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    for eps in (2.0000002, 1.9999999):  # at exactly 2 PyTorch's own versions differ
        with fastkd.use_backend(backend):
            got = fetched(
                evaluate(
                    lambda x: fastkd.attention_map(x, eps=eps),
                    [place(x, backend)],
                    upstream=place(upstream, backend),
                )
            )
        want = evaluate(lambda x: ref.attention_map(x, eps=eps), [x], upstream=upstream)
        torch.testing.assert_close(got.grads, want.grads, rtol=1e-5, atol=1e-6)
