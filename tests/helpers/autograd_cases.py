"""Chains of features that learn, and a loss with its gradients."""

from __future__ import annotations

import torch

TRAINING = {  # name -> (module with the functions, student, teacher) -> scalar
    "attention_map": lambda m, s, t: sum(
        (m.attention_map(a) * m.attention_map(b)).sum() for a, b in zip(s, t)
    ),
    "attention_transfer_loss": lambda m, s, t: m.attention_transfer_loss(s, t, weight=100.0),
    "fsp_matrix": lambda m, s, t: sum(
        (m.fsp_matrix(s[i], s[i + 1]) - m.fsp_matrix(t[i], t[i + 1])).square().sum() for i in range(2)
    ),
    "fsp_loss": lambda m, s, t: m.fsp_loss(s, t),
}


def agree(got, want, rtol=2e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=rtol, atol=rtol * b.abs().max().item())


def gradients(loss, *tensors):
    """[the loss of ``tensors``, its gradient in each of them]"""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = loss(*leaves)
    return [out, *torch.autograd.grad(out, leaves)]
