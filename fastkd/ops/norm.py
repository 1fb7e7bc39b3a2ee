"""NORM's comparison of a feature with repeats of a target: loss and gradient in one pass, no repeat made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import reference
from fastkd.ops._differences import difference, difference_loss, fused, served

difference_loss("norm_loss", "int copies")


def norm_loss(u: Tensor, target: Tensor, copies: int) -> Tensor:
    """``copies`` times the mean squared difference of u (N, copies * C, H, W) and ``copies`` repeats of
    ``target``, one after the other.

    A larger target (N, C, H', W') is max-pooled to H x W. The repeats are never made. float32, float64 if
    either is float64. On a CPU, dense tensors of one dtype but float64 are read once, for the loss and the
    gradient of u; a second derivative of it raises RuntimeError.
    """
    if target.shape[2:] != u.shape[2:]:
        target = F.adaptive_max_pool2d(target, u.shape[2:])
    fits = u.shape[0] == target.shape[0] and u.shape[1] == copies * target.shape[1]
    followed = target.requires_grad and torch.is_grad_enabled()
    if followed or not fits or not fused(u) or not served(u, target):
        return reference.norm_loss(u, target, copies)
    return difference("norm_loss", [u], [target], copies)
