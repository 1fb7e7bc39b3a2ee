"""Contrastive representation distillation: scores of drawn rows of two banks, no tensor (B, K + 1, D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, reference
from fastkd._implementations import CPP, REFERENCE, TRITON, Backend
from fastkd._private import dispatch_watched, few_frames, is_wrapper, transforming
from fastkd.ops._cuda_limits import no_kernel
from fastkd.ops._gradients import save, scaled, where_needed
from fastkd.ops._register import autograd, define, implement, part_of
from fastkd.reference.common import accumulator, no_autocast

NUMBERS = 2**22
"""How many numbers a chunk of samples makes: scores against a whole bank, or drawn rows of it."""
CHEAPER = 64
"""How many rows of a bank a product of matrices takes in the time of one that is gathered."""


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    rows: Tensor,
    *,
    temperature: float = 0.07,
    normalizers: Tensor | Sequence[float] | None = None,
    eps: float = 1e-7,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Noise-contrastive loss that tells the other network's embedding of an image from those of drawn images,
    in both directions.

    Args:
        student, teacher: (N, D) floating point, embeddings of length 1.
        student_bank, teacher_bank: (M, D) floating point, an embedding of each image of the training set.
            They are constants.
        rows: (N, K + 1) int64, rows of the banks, K >= 1: column 0 is the positive, the others are the
            negatives.
        temperature: T, above 0, and large enough that M exp(1 / T) is finite.
        normalizers: two numbers, Z of the student's scores against ``teacher_bank`` and of the teacher's
            against ``student_bank``; one that is not above 0 is found in this call, as both are for None: ``M
            * P.mean()`` of P before its division.
        eps: at least 0.
        weight: multiplies the loss.

    Returns: (the scalar, the two normalizers (2,) that were used, without gradient); float32, float64 if any
    input is float64. Each direction, with ``P = exp(embedding @ bank[row] / T) / Z`` and ``c = K / M``, is
    ``-1 / N`` times the sum of ``log(P / (P + c + eps))`` over the positives and of ``log(c / (P + c +
    eps))`` over the negatives; the loss is the sum of both. The gradients are found with the scores, and
    memory is never (N, K + 1, D). On a CPU and in float32 a kernel sorts the drawn rows by where they lie in
    the bank and reads a tile of them for scores and again for the gradient, and once more before that for a
    normalizer it must find: memory is O(N K). On a GPU Triton's kernel reads them in the order of ``rows``,
    once, and once more for such a normalizer, from two banks of one dtype that is not float64: memory is O(N
    D P), P the parts into which K is divided. Other banks that are not in the dtype of the computation are
    copied to it whole in every call: those of half precision without Triton, and one of two that differ.
    Elsewhere scores come from one product with the whole bank where enough of it is drawn, else from a chunk
    of samples at a time. On a GPU the values of ``rows`` are not checked: one outside the banks makes loss
    and gradient NaN, and fails an assertion of plain PyTorch.
    Raises: TypeError, ValueError for what does not fit. A second derivative raises RuntimeError;
    ``fastkd.reference`` has one.
    Source: Tian, Krishnan, Isola, *Contrastive representation distillation*, ICLR 2020.
    """
    checks.crd_loss(student, teacher, student_bank, teacher_bank, rows, temperature, normalizers, eps, weight)
    # only the reference supports tensor wrappers and transforms; graphs and dispatch modes get the operator
    beyond = is_wrapper(student) or transforming()
    impl = None
    if beyond or not (torch.compiler.is_compiling() or dispatch_watched()):
        given = student, teacher, student_bank, teacher_bank, normalizers
        impl = backends.select("crd_pass", given, no_kernel, rows.shape[1:])
        if beyond and impl is REFERENCE:
            options: dict[str, Any] = {
                "temperature": temperature,
                "normalizers": normalizers,
                "eps": eps,
                "weight": weight,
            }
            return reference.crd_loss(student, teacher, student_bank, teacher_bank, rows, **options)
    s, t, z, *banks = _inputs(student, teacher, student_bank, teacher_bank, normalizers)
    followed = torch.is_grad_enabled()
    needs = followed and s.requires_grad, followed and t.requires_grad
    numbers = float(temperature), float(eps), float(weight)
    if impl is None:
        loss, found, _, _ = torch.ops.fastkd.crd_loss.default(s, t, *banks, rows, z, *numbers, *needs)
        return loss, found
    both: tuple[Tensor, Tensor] = CRDFunction.apply(impl, s, t, *banks, rows, z, *numbers, needs)
    return both


def _inputs(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    normalizers: Tensor | Sequence[float] | None,
) -> list[Tensor]:
    """Embeddings, normalizers and banks: all in one dtype, but for two banks of half precision, which
    Triton's kernels read as they are.
    """
    given = reference.vectors.crd_normalizers(normalizers, student)
    embeddings, banks = (student, teacher, given), (student_bank.detach(), teacher_bank.detach())
    dtype = accumulator((*embeddings, *banks))
    half = dtype == torch.float32 and banks[0].dtype == banks[1].dtype
    return [x.to(dtype) for x in embeddings] + [bank if half else bank.to(dtype) for bank in banks]


def _loss(s: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator of graphs, which selects a backend each time it runs."""
    s_bank, t_bank, rows = rest[:3]
    impl = backends.select("crd_pass", (s, t, s_bank, t_bank), no_kernel, rows.shape[1:])
    return _loss_by(impl, s, t, *rest)


def _loss_by(
    impl: Backend,
    s: Tensor,
    t: Tensor,
    s_bank: Tensor,
    t_bank: Tensor,
    rows: Tensor,
    given: Tensor,
    temperature: float,
    eps: float,
    weight: float,
    need_s: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, normalizers, the loss's gradient for s, for t); a gradient that nobody needs has no elements."""
    numbers = temperature, eps, weight, need_s, need_t
    by_cpp = impl is CPP and s.dtype == torch.float32
    if not by_cpp:  # whose kernel looks at the rows itself
        checks.crd_rows(rows, len(s_bank))
    if impl is TRITON:
        return _pass(impl, s, t, s_bank, t_bank, rows, given, *numbers)
    s_bank, t_bank = s_bank.to(s.dtype), t_bank.to(s.dtype)
    if by_cpp:
        try:
            return _pass(impl, s, t, s_bank, t_bank, rows, given, *numbers)
        except RuntimeError:
            checks.crd_rows(rows, len(s_bank))  # says which row, and what was wanted
            raise
    with no_autocast(s):
        sides = [
            _direction(x, bank, rows, z, temperature, eps, weight, need)
            for x, bank, z, need in ((s, t_bank, given[0], need_s), (t, s_bank, given[1], need_t))
        ]
    losses, found, grads = zip(*sides, strict=True)
    return losses[0] + losses[1], torch.stack(found), *grads


def _pass(impl: Backend, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of a backend; it takes contiguous tensors."""
    given = (x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
    made: tuple[Tensor, Tensor, Tensor, Tensor] = impl.run("crd_pass", *given)
    return made


def _fake(
    s: Tensor,
    t: Tensor,
    s_bank: Tensor,
    t_bank: Tensor,
    rows: Tensor,
    given: Tensor,
    temperature: float,
    eps: float,
    weight: float,
    need_s: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = where_needed(_contiguous, (s, t), (need_s, need_t))
    return s.new_empty(()), s.new_empty(2), grads[0], grads[1]


def _contiguous(x: Tensor) -> Tensor:
    """For the gradient of x, which no implementation lays out as x is."""
    return x.new_empty(x.shape)


def _direction(
    x: Tensor,
    bank: Tensor,
    rows: Tensor,
    given: Tensor,
    temperature: float,
    eps: float,
    weight: float,
    need: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, normalizer, gradient) of the embeddings ``x`` against a bank."""
    size, noise = len(bank), (rows.shape[1] - 1) / len(bank)
    chunks, whole = _chunks(bank, rows)
    scaled = x / temperature
    scores = x.new_empty(rows.shape)
    for part in chunks:
        scores[part] = (
            (scaled[part] @ bank.T).gather(1, rows[part])
            if whole
            else (bank[rows[part]] @ scaled[part, :, None])[..., 0]
        )
    positive, odds = scores[:, 0].clone(), scores.exp_()
    normalizer = torch.where(given > 0, given, odds.mean() * size)
    # log(P / (P + c + eps)) by the logarithm of P, and log(c / (P + c + eps)) = -log1p((P + eps) / c): in
    # float32, c + P would be rounded
    against = math.log(noise + eps) + normalizer.log() - positive
    odds.mul_(1 / (normalizer * noise))
    shifted = odds[:, 1:] + eps / noise
    factor = weight / len(x)
    loss = factor * (torch.logaddexp(against, torch.zeros_like(against)).sum() + shifted.log1p().sum())
    if not need:
        return loss, normalizer, x.new_empty(0)
    slopes = odds  # of the loss by each score
    slopes[:, 1:] /= shifted.add_(1)
    slopes[:, 0] = -against.sigmoid()
    slopes *= factor / temperature
    grad = _contiguous(x)
    for part in chunks:
        if whole:
            grad[part] = added(slopes[part], rows[part], size, x.device.type == "cpu") @ bank
        else:
            grad[part] = (slopes[part, None] @ bank[rows[part]])[:, 0]
    return loss, normalizer, grad


def added(slopes: Tensor, rows: Tensor, size: int, on_cpu: bool) -> Tensor:
    """(N, size): each sample's slopes, added where its rows are, in one order on a GPU too.

    There ``scatter_add_`` adds in any order, and ``index_put_`` sorts; on a CPU it is the other way round.
    """
    found = slopes.new_zeros(len(slopes), size)
    if on_cpu:
        return found.scatter_add_(1, rows, slopes)
    samples = torch.arange(len(rows), device=rows.device)[:, None]
    return found.index_put_((samples, rows), slopes, accumulate=True)


def _chunks(bank: Tensor, rows: Tensor) -> tuple[list[slice], bool]:
    """(chunks of samples that are computed together, whether each is scored against the whole bank)."""
    (size, width), (count, drawn) = bank.shape, rows.shape
    whole = drawn * CHEAPER >= size and count * drawn >= size
    step = max(64, NUMBERS // size) if whole else max(1, NUMBERS // (drawn * width))
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)], whole


@few_frames
class CRDFunction(torch.autograd.Function):
    """``apply(impl, s, t, s_bank, t_bank, rows, given, temperature, eps, weight, needs)`` -> (loss,
    normalizers), past the dispatcher and its host cost.
    """

    @staticmethod
    def forward(ctx: Any, impl: Backend, s: Tensor, t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *arguments, needs = rest
        loss, normalizers, *grads = _loss_by(impl, s, t, *arguments, *needs)
        save(ctx, grads, (s, t), needs)
        ctx.mark_non_differentiable(normalizers)
        return loss, normalizers

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        return None, *scaled(ctx, "crd_loss", upstream), *[None] * 8


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    save(ctx, output[2:], inputs[:2], inputs[-2:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    return (*scaled(ctx, "crd_loss", upstream), *[None] * 9)


_ARGUMENTS = (
    "(Tensor s, Tensor t, Tensor s_bank, Tensor t_bank, Tensor rows, Tensor given, float temperature,"
    " float eps, float weight, bool need_s, bool need_t) -> (Tensor loss, Tensor normalizers, Tensor s_grad,"
    " Tensor t_grad)"
)
define(f"crd_loss{_ARGUMENTS}", _fake, one_namespace=True)
implement("crd_loss", _loss)
autograd("crd_loss", _gradients, _context, one_namespace=True)
part_of("crd_loss", f"crd_pass{_ARGUMENTS}", _fake)
