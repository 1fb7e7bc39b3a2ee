"""A batch norm in training with the addition and the ReLU that follow it, as one operation: of a step's time
they take the largest part after convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import backends, native, reference
from fastkd._implementations import CPP
from fastkd._private import batched, few_frames, has_hooks, recorded_elsewhere, transforming
from fastkd.ops._register import autograd, define, differentiable_once, not_differentiable


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(torch.empty_like(weight) for _ in range(3))


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    relu: bool,
    residual: bool,
) -> tuple[Tensor, ...]:
    dresidual = torch.empty_like(x) if relu and residual else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias), dresidual


define(
    "batch_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, bool relu, float eps)"
    " -> (Tensor y, Tensor mean, Tensor variance, Tensor invstd)",
    _fake,
    one_namespace=True,
)
# dresidual is empty unless there are both a residual and a ReLU
define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor weight, Tensor bias, Tensor mean, Tensor"
    " invstd, bool relu, bool residual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    _backward_fake,
    one_namespace=True,
)
differentiable_once("batch_norm_backward", one_namespace=True)

define("add_relu_(Tensor(a!) x, Tensor? residual) -> Tensor(a!)", lambda x, residual: x, one_namespace=True)
not_differentiable("add_relu_", "torch.relu(x + residual)")


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, relu, eps = inputs
    y, mean, _, invstd = output
    # without a residual the ReLU's gate is found from x, which is read anyway
    ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, invstd)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.relu, ctx.residual, ctx.eps = relu, residual is not None, eps


def _gradients(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    if batched(grad):
        return _gradients_in_pytorch(ctx, grad)
    grad = grad.contiguous(memory_format=torch.channels_last)
    dx, dweight, dbias, dresidual = ctx.impl.run_backward(
        "batch_norm_backward", grad, *ctx.saved_tensors, ctx.relu, ctx.residual
    )
    return dx, (dresidual if ctx.relu else grad) if ctx.residual else None, dweight, dbias, None, None


autograd("batch_norm", _gradients, _context, one_namespace=True)


@few_frames
class BatchNormFunction(torch.autograd.Function):
    """``apply(x, residual, weight, bias, relu, eps)`` -> y, mean, unbiased variance, 1 / sqrt(variance +
    eps); only y has a gradient.

    With g the gradient of y where y > 0 (all of it without a ReLU), d = x - mean and k = weight * invstd:
    dx = k (g - sum(g) / M - d invstd^2 sum(g d) / M) for sums over the M values of a channel, dresidual = g.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = CPP.run("batch_norm", *inputs)
        _context(ctx, inputs, output)
        ctx.impl = CPP
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is not None and torch.is_grad_enabled():  # a graph of the backward pass is wanted
            return _gradients_in_pytorch(ctx, grad)
        return _gradients(ctx, grad)


def _gradients_in_pytorch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients where they are to be differentiated themselves, or ``grad`` is a batch of gradients."""
    x, y, weight, bias, _, _ = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        normed = reference.batch_norm(x, None, weight, bias, relu=False, eps=ctx.eps)
    passed = grad * ((normed if y is None else y) > 0) if ctx.relu else grad
    wanted = [tensor for tensor in (x, weight, bias) if tensor.requires_grad]
    found = iter(torch.autograd.grad(normed, wanted, passed, create_graph=again) if wanted else ())
    dx, dweight, dbias = (next(found) if tensor.requires_grad else None for tensor in (x, weight, bias))
    return dx, passed if ctx.residual else None, dweight, dbias, None, None


def add(y: Tensor, residual: Tensor, *, owned: bool) -> Tensor:
    """``y + residual``, written into y if no other code can hold y (``owned``).

    Inside torch.func it is always a new tensor: vmap cannot write a batched tensor into one that is not.
    """
    return y.add_(residual) if owned and isinstance(y, Tensor) and not transforming() else y + residual


def batch_norm(
    norm: Any, x: Tensor, residual: Tensor | None = None, *, relu: bool = False, owned: bool = False
) -> Tensor:
    """``norm(x)``, plus ``residual`` and followed by a ReLU where asked for. Running averages are updated as
    usual.

    A :class:`torch.nn.BatchNorm2d` in training, with parameters of float32 or of x's dtype, over dense
    channels_last x and residual of float16, bfloat16 or float32 on a CPU, is one operator that reads x twice
    and writes once; its backward pass reads x and what arrives twice, or, where a residual and a ReLU
    followed, the result and what arrives once, and then the gradient that it wrote for the residual. It sums
    in float32 within a few thousand numbers and in float64 from there on, and rounds once. Everything else
    (another device, layout or dtype, eval mode, a norm with hooks or a forward of its own or without
    averages, any other module in its place, a transform of torch.func, any tracer but ``torch.compile``) is
    plain PyTorch. There addition and ReLU overwrite a tensor that nobody else can hold, the output of a batch
    norm that is :func:`untouched`, and where no gradient is wanted they are one pass over it. Backends asked
    for by name other than "cpp" are plain PyTorch. Half-precision parameters and averages are widened to
    float32 there too: PyTorch by itself rounds the batch's mean to their dtype on a CPU.

    Args:
        norm: the module whose weight, bias and averages they are, at its place in the network.
        x: (N, C, H, W).
        residual: None, or a tensor like x.
        relu: whether a ReLU ends it.
        owned: whether x was made for this call alone, so that it may be overwritten where ``norm`` is an
            Identity.

    Returns: like x. Equals ``torch.relu(norm(x) + residual)``; differentiable, twice too.
    Source: Ioffe, Szegedy, *Batch normalization*, ICML 2015.
    """
    if not _served(norm, x, residual):
        half = _in_half_precision(norm, x) and not recorded_elsewhere() and not transforming()
        y = _normed_in_float32(norm, x) if half else norm(x)
        # what another module, a hook or a tracer handed back may be x, or be held by it
        fresh = isinstance(y, Tensor) and (
            untouched(norm, nn.BatchNorm2d) or (owned and untouched(norm, nn.Identity))
        )
        if relu and fresh and _joined(y, residual):
            return CPP.run("add_relu_", y, residual)
        if residual is not None:
            y, fresh = add(y, residual, owned=fresh), isinstance(y, Tensor)
        return F.relu(y, inplace=fresh) if relu else y
    run = CPP.graph_op("batch_norm") if torch.compiler.is_compiling() else BatchNormFunction.apply
    y, mean, variance, _ = run(x, residual, norm.weight.float(), norm.bias.float(), relu, norm.eps)
    with torch.no_grad():
        for average, value in ((norm.running_mean, mean), (norm.running_var, variance)):
            if average.dtype == torch.float32:
                average.lerp_(value, norm.momentum)
            else:
                average.copy_(average.float().lerp_(value, norm.momentum))
        norm.num_batches_tracked.add_(1)
    return y


def _normed_in_float32(norm: Any, x: Tensor) -> Tensor:
    """``norm(x)`` by float32 copies of its parameters and averages."""
    averages = norm.running_mean, norm.running_var
    mean, variance = (average.float() for average in averages)
    y = F.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), True, norm.momentum, norm.eps)
    with torch.no_grad():
        for average, value in zip(averages, (mean, variance)):
            average.copy_(value)
        norm.num_batches_tracked.add_(1)
    return y


def conv_norm(
    conv: Any, norm: Any, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """``batch_norm(norm, conv(x), residual, relu=relu)``, which may overwrite the convolution's output where
    the norm was folded into it and is an Identity now.
    """
    return batch_norm(
        norm, conv(x), residual, relu=relu, owned=type(norm) is nn.Identity and untouched(conv, nn.Conv2d)
    )


def untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Whether ``module(x)`` is PyTorch's own ``kind.forward`` and no code of a user sees what goes in or
    comes out: no subclass (nor a parametrization, which makes one), no forward of the instance's own, no
    hooks of this module or of all modules.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not has_hooks(module)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _served(norm: Any, x: Tensor, residual: Tensor | None) -> bool:
    if not (_replaceable(norm) and _in_kernels(x, residual)):
        return False
    return norm.weight.dtype in (torch.float32, x.dtype) and x.numel() // x.shape[1] > 1


def _replaceable(norm: Any) -> bool:
    """Whether the norm may be computed in another way without any visible difference."""
    plain = untouched(norm, nn.BatchNorm2d) and norm.training and norm.affine
    return plain and norm.track_running_stats and norm.momentum is not None


def _in_half_precision(norm: Any, x: Tensor) -> bool:
    """Whether PyTorch itself would round the batch's mean to the parameters' dtype: 0.24 deviations for
    bfloat16 and a mean of 100.
    """
    if not (isinstance(x, Tensor) and x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)):
        return False
    return _replaceable(norm) and norm.weight.dtype == x.dtype


def _joined(y: Tensor, residual: Tensor | None) -> bool:
    """Whether addition and ReLU are the operator's: eager and without gradients. A compiler fuses the formula
    with what is before it.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return _in_kernels(y, residual)


def _in_kernels(x: Tensor, residual: Tensor | None) -> bool:
    if type(x) not in (Tensor, nn.Parameter):
        return False  # a DTensor, a fake tensor; torch.fx gives no tensors at all
    if (
        not (x.is_cpu and native.CPU.available and backends.current() in ("auto", "cpp"))
        or recorded_elsewhere()
        or transforming()
    ):
        return False
    alike = residual is None or (residual.dtype == x.dtype and residual.shape == x.shape and _dense(residual))
    return alike and x.dtype in _DTYPES and x.dim() == 4 and _dense(x)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
