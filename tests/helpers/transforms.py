"""Transforms of torch.func, and what answers under them."""

from __future__ import annotations

import pytest
import torch
from support import values
from torch import func
from torch.autograd import forward_ad

from fastkd import native

SHAPES = ((2, 3, 4, 3), (2, 4, 4, 3), (2, 5, 4, 3))
compiled = pytest.mark.skipif(not native.CPU.available, reason="needs the CPU library")


def features(dtype=torch.float32):
    return [values(shape, dtype) for shape in SHAPES]


def forward_mode(f, s):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*[forward_ad.make_dual(x, torch.ones_like(x)) for x in s])).tangent


TRANSFORMS = {  # name -> (scalar function of the stages, stages) -> what comes of it
    "forward mode AD": forward_mode,
    "jvp": lambda f, s: func.jvp(f, tuple(s), tuple(torch.ones_like(x) for x in s))[1],
    "grad": lambda f, s: func.grad(f, argnums=(0, 1))(*s),
    "vjp": lambda f, s: func.vjp(f, *s)[1](torch.tensor(2.0)),
    "vmap": lambda f, s: func.vmap(f)(*[torch.stack([x, 2 * x]) for x in s]),
    "nested vmap": lambda f, s: func.vmap(
        lambda x: func.vmap(lambda y: f(x, y, *s[2:]))(torch.stack([s[1], -s[1]]))
    )(torch.stack([s[0]] * 2)),
    "vmap of grad": lambda f, s: func.vmap(func.grad(f))(*[torch.stack([x, 2 * x]) for x in s]),
    "jacrev": lambda f, s: func.jacrev(f)(*s),
    "jacfwd": lambda f, s: func.jacfwd(f)(s[0][:1, :1], *[x[:1] for x in s[1:]]),
    "grad of grad": lambda f, s: func.grad(lambda x: func.grad(f)(x, *s[1:]).square().sum())(s[0]),
    "functionalize": lambda f, s: func.functionalize(f)(*s),
}


def flat(x):
    return [z for y in x for z in flat(y)] if isinstance(x, (list, tuple)) else [x]


def agree(found, wanted, rtol=1e-4):
    for a, b in zip(flat(found), flat(wanted), strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=rtol * max(1e-3, b.abs().max().item()))


def torchjd(losses, inputs):
    """What TorchJD does: a vmap over backward passes."""
    return func.vmap(lambda g: torch.autograd.grad(losses, inputs, g, retain_graph=True, allow_unused=True))(
        torch.eye(len(losses), device=losses.device)
    )


BATCHED = {
    "is_grads_batched": lambda losses, inputs: torch.autograd.grad(
        losses, inputs, torch.eye(len(losses), device=losses.device), retain_graph=True, is_grads_batched=True
    ),
    "vmap over backward passes": torchjd,
}


def first(output):
    return flat(output)[0]
