"""Autocast and every mix of dtypes: gradients in the dtypes of their inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from autograd_cases import TRAINING, agree
from support import DTYPES, check_loss, evaluate, make, name, ref, ulp, values

import fastkd
from fastkd import backends

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_autocast_casts_nothing(dtype, layout):
    conv = torch.nn.Conv2d(3, 8, 3).to(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    image, teacher = make((4, 3, 10, 10), torch.float32, layout), values((4, 8, 8, 8), torch.float32)
    for function in ("attention_transfer_loss", "fsp_loss"):
        grads = []
        for module in (fastkd, ref):
            with torch.autocast("cpu", dtype=dtype):
                feature = conv(image)
                loss = TRAINING[function](module, [feature, feature.relu()], [teacher, teacher.relu()])
            assert feature.dtype == dtype and loss.dtype == torch.float32
            grads.append((loss.detach(), *torch.autograd.grad(loss, (feature, conv.weight))))
        assert grads[0][1].dtype == dtype
        if backends.select("attention_map", (feature,), lambda *given: "").name == "cpp":
            assert grads[0][1].stride() == feature.stride()
        agree([grads[0][0]], [grads[1][0]], 1e-5)
        agree(grads[0][1:], grads[1][1:], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_half_gradients_survive_the_published_weight_and_loss_scale(dtype):
    """ResNet-20's stages at batch 128, weight 1000 and a GradScaler's 65536: finite, within one ulp, hardly
    any flushed to zero.
    """
    s = [values((128, c, n, n), dtype, "normal") for c, n in ((16, 32), (32, 16), (64, 8))]
    t = [values(x.shape, dtype) for x in s]
    upstream = torch.tensor(65536.0)
    got, eager = (
        evaluate(lambda *x: m.attention_transfer_loss(x, t, weight=1000.0), xs, upstream=upstream)
        for m, xs in ((fastkd, s), (ref, [x.float() for x in s]))
    )
    for g, w in zip(got.grads, eager.grads):
        assert g.isfinite().all() and g.dtype == dtype
        assert (g.double() - w.double()).abs().max() <= ulp(dtype, w.abs().max().item())
        assert ((g == 0) & (w != 0)).double().mean() < 0.01
    unscaled = evaluate(lambda *x: fastkd.attention_transfer_loss(x, t, weight=1000.0), s)
    for g, w in zip(unscaled.grads, eager.grads):
        assert ((g == 0) & (w != 0)).double().mean() < 0.2


def test_every_mix_of_dtypes_returns_gradients_in_the_inputs_own():
    for dtypes in itertools.product(DTYPES, DTYPES):
        s, t = ([make((2, 4, 5, 5), dtype) for _ in range(2)] for dtype in dtypes)
        for function in ("attention_transfer_loss", "fsp_loss"):
            check_loss(backends.select(function, (s, t), lambda *given: "").name, function, s, t)
