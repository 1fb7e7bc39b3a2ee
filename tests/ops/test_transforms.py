"""torch.func, forward mode AD and batched gradients: the right derivative, or one sentence that names the
reference; never a wrong number.

``auto`` takes plain PyTorch there, a backend by name refuses, and so do the operators themselves. A backward
pass that was recorded outside and is given several gradients at once answers them all.
"""

from __future__ import annotations

import pytest
import torch
from support import KERNELS, place, ref
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from transforms import BATCHED, TRANSFORMS, agree, compiled, features

import fastkd
from fastkd import native

pytestmark = pytest.mark.usefixtures("one_thread")
# name -> (module with the functions, student's stages, teacher's) -> scalar
CALLS = {
    "attention_map": lambda m, s, t: (m.attention_map(s[0], 1.5) * t[0].mean(1)).sum(),
    "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=100.0),
    "fsp_matrix": lambda m, s, t: m.fsp_matrix(s[0], s[1]).square().sum() + m.fsp_matrix(s[1], t[2]).sum(),
    "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
    "tap": lambda m, s, t: sum(((y * z).sum() + a[0].sum()) for (y, a), z in zip(map(m.tap, s), t)),
    "relu_tap": lambda m, s, t: sum(
        ((y * z).sum() + a[0].sum()) for (y, a), z in ((m.relu_tap(x, z), z) for x, z in zip(s, t))
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_inside_a_transform_is_the_references_or_refused_in_one_sentence(call, transform):
    s, t = features(), features()
    run = TRANSFORMS[transform]
    shapes = [
        x[:1, :1] if transform == "jacfwd" and i == 0 else x[:1] if transform == "jacfwd" else x
        for i, x in enumerate(t)
    ]
    wanted = run(lambda *s: CALLS[call](ref, list(s), shapes), s)
    with fastkd.use_backend("auto"):
        agree(run(lambda *s: CALLS[call](fastkd, list(s), shapes), s), wanted)
    if not native.CPU.available:
        return
    with fastkd.use_backend("cpp"), pytest.raises(fastkd.BackendError) as caught:
        run(lambda *s: CALLS[call](fastkd, list(s), shapes), s)
    assert f"fastkd.reference.{call}" in str(caught.value) and "\n" not in str(caught.value)


@compiled
@pytest.mark.parametrize("call", CALLS)
def test_a_named_backend_serves_tensors_without_tangents_beside_others(call):
    s, t = features(), features()
    with forward_ad.dual_level(), fastkd.use_backend("cpp"):
        forward_ad.make_dual(s[0].clone(), torch.ones_like(s[0]))
        agree(CALLS[call](fastkd, s, t), CALLS[call](ref, s, t))


ON = [
    pytest.param(backend.values[0], call, marks=backend.marks, id=f"{backend.id}-{call}")
    for backend in KERNELS
    for call in CALLS
    if (backend.values[0], call) != ("cuda", "attention_map")  # serves p = 2
]


@pytest.mark.parametrize("backend, call", ON)
def test_batched_gradients_answer_every_one(backend, call):
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (backend != "triton")]:  # which is interpreted
        s, t = ([place(x, backend).requires_grad_(grad) for x in features(dtype)] for grad in (True, False))
        for way in BATCHED.values():
            found = []
            for m in (fastkd, ref):
                with fastkd.use_backend(backend if m is fastkd else "auto"):
                    losses = torch.stack([CALLS[call](m, s, t), 3 * CALLS[call](m, s, t)])
                    used = [
                        x
                        for x, g in zip(
                            s, torch.autograd.grad(losses.sum(), s, retain_graph=True, allow_unused=True)
                        )
                        if g is not None
                    ]
                    found.append(way(losses, used))
            assert all(x.dtype == dtype for x in found[0])
            agree(*found, rtol=1e-4 if dtype == torch.float32 else 2e-2)


@compiled
@pytest.mark.parametrize("call", ["attention_transfer_loss", "fsp_loss"])
def test_a_batched_loss_scale_is_applied_before_halves_are_rounded(call):
    """With a factor of 1 most of these gradients are no numbers of float16."""
    s, t = (
        [(x * (1 + 3 * grad)).requires_grad_(grad) for x in features(torch.float16)] for grad in (True, False)
    )
    grads = torch.tensor([2.0**14, 2.0**16])
    found = []
    for m, backend in ((fastkd, "cpp"), (ref, "auto")):
        with fastkd.use_backend(backend):
            loss = getattr(m, call)(s, t, weight=1e-6)
        found.append(torch.autograd.grad(loss, s, grads, is_grads_batched=True))
    for a, b in zip(*found, strict=True):
        assert b.abs().max() < 0.5 and ((a == 0) == (b == 0)).double().mean() > 0.95
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("call", CALLS)
def test_a_vectorized_jacobian_is_the_references(call, strategy):
    s, t = features(), features()
    with fastkd.use_backend("auto"):
        found, wanted = (
            jacobian(lambda x: CALLS[call](m, [x, *s[1:]], t), s[0], vectorize=True, strategy=strategy)
            for m in (fastkd, ref)
        )
    agree(found, wanted)


@compiled
@pytest.mark.parametrize("call", CALLS)
def test_a_second_derivative_of_a_batched_gradient_is_right_or_refused(call):
    s, t = ([x.requires_grad_(grad) for x in features(torch.float64)] for grad in (True, False))

    def second(m):
        losses = torch.stack([CALLS[call](m, s, t), 3 * CALLS[call](m, s, t)])
        (first,) = torch.autograd.grad(
            losses, s[:1], torch.eye(2, dtype=torch.float64), is_grads_batched=True, create_graph=True
        )
        return torch.autograd.grad(first.square().sum(), s[0])[0]

    wanted = second(ref)
    try:
        with fastkd.use_backend("cpp"):
            agree(second(fastkd), wanted)
    except RuntimeError as refused:
        assert f"fastkd.reference.{call}" in str(refused)
