"""The reference: every operation of fastkd in plain PyTorch, differentiable twice, on any device.

Same names and signatures as the public functions. Inputs may be float16, bfloat16, float32 or float64 and
differ in dtype; everything is computed and returned in float32, or in float64 if any input is float64,
whatever autocast says. The kernels are tested against this file in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks, graphs
from fastkd.checks import Features

_POOLS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "avg": (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    "max": (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
}


def _widen(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(dtype) for x in tensors]


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    # asked of the tensor: PyTorch 2.11 does not compile torch.amp.is_autocast_available
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _smaller(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [min(i, j) for i, j in zip(a, b, strict=True)]


def _pool(x: Tensor, size: list[int], mode: str) -> Tensor:
    return x if list(x.shape[2:]) == size else _POOLS[mode][len(size) - 1](x, size)


def _energy(x: Tensor, p: float, channel_reduce: str, signed: bool) -> Tensor:
    # a number that only a graph knows is a tensor here: as a float, PyTorch 2.11 asks whether it is 2
    p = torch.as_tensor(p, dtype=x.dtype) if checks.known_to_graph(p) else float(p)  # type: ignore[assignment]
    # a graph has no second derivative, and would be compiled for even powers and for others apart
    if torch.compiler.is_compiling():
        power = (x if signed else x.abs()).pow(p)
        return power.mean(1) if channel_reduce == "mean" else power.sum(1)
    # an even power needs no absolute value, and without it the second derivative at 0 is right
    base = x if signed or p % 2 == 0 else x.abs()
    if 1 < p < 2:  # the first derivative at 0 is 0, the second has no limit: taken as 0, as that of abs is
        zero = base == 0
        power = base.masked_fill(zero, 1).pow(p).masked_fill(zero, 0)
    else:
        power = base.pow(p)
    return power.mean(1) if channel_reduce == "mean" else power.sum(1)


def _norm(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """``torch.linalg.vector_norm``, ``dim`` kept, but a constant at 0: its second derivative there is NaN."""
    if torch.compiler.is_compiling():  # a graph has no second derivative
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    zero = torch.linalg.vector_norm(x.detach(), dim=dim, keepdim=True) == 0
    return torch.linalg.vector_norm(x.masked_fill(zero, 1), dim=dim, keepdim=True).masked_fill(zero, 0)


def _normalize(q: Tensor, eps: float, eps_mode: str) -> Tensor:
    norm = _norm(q, tuple(range(1, q.dim())))
    return q / (norm.clamp_min(float(eps)) if eps_mode == "clamp" else norm + float(eps))


def _combine(terms: list[Tensor], weights: Sequence[float] | None, reduce: str, weight: float) -> Tensor:
    if weights is not None:
        terms = [float(w) * term for w, term in zip(weights, terms, strict=True)]
    total, weight = torch.stack(terms).sum(), float(weight)
    return total * (weight / len(terms) if reduce == "mean" else weight)


def attention_map(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    normalize: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> Tensor:
    """See :func:`fastkd.attention_map`."""
    checks.attention_map(x, p, channel_reduce, eps, eps_mode)
    with _no_autocast(x):
        (x,) = _widen(x)
        q = _energy(x, p, channel_reduce, signed)
        return _normalize(q, eps, eps_mode) if normalize else q


def tap(
    x: Tensor,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """See :func:`fastkd.tap`."""
    return x, attention_map(x, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)


def relu_tap(
    x: Tensor,
    residual: Tensor | None = None,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
) -> tuple[Tensor, Tensor]:
    """See :func:`fastkd.relu_tap`."""
    checks.relu_tap(x, residual, p, channel_reduce, eps, eps_mode)
    y = torch.relu(x if residual is None else x + residual)
    return y, attention_map(y, p, channel_reduce=channel_reduce, signed=signed, eps=eps, eps_mode=eps_mode)


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, relu: bool = False, eps: float = 1e-5
) -> Tensor:
    """The y of :func:`fastkd.ops.batch_norm.batch_norm`, by x's statistics; of x's dtype, rounded once."""
    with _no_autocast(x):
        wide, w, b = _widen(x, weight, bias)
        y = F.batch_norm(wide, None, None, w, b, training=True, eps=eps)
        if residual is not None:
            y = y + residual
        return (torch.relu(y) if relu else y).to(x.dtype)


def attention_transfer_loss(
    student: Features,
    teacher: Features,
    p: float = 2.0,
    *,
    channel_reduce: str = "mean",
    signed: bool = False,
    eps: float = 1e-12,
    eps_mode: str = "clamp",
    pool: str = "before",
    pool_mode: str = "avg",
    difference: str = "squared",
    stage_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    teacher_is_map: bool = False,
    student_is_map: bool = False,
) -> Tensor:
    """See :func:`fastkd.attention_transfer_loss`."""
    students, teachers = checks.attention_transfer(
        student,
        teacher,
        p,
        channel_reduce,
        eps,
        eps_mode,
        pool,
        pool_mode,
        difference,
        stage_reduce,
        weights,
        weight,
        teacher_is_map,
        student_is_map,
    )

    if (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in students + teachers)
    ):
        checks.one_position(students, teachers, teacher_is_map, student_is_map)

    def normalized(x: Tensor, is_map: bool, size: list[int]) -> Tensor:
        if is_map:
            return x
        if pool == "before":
            x = _pool(x, size, pool_mode)
        q = _energy(x, p, channel_reduce, signed)
        return _normalize(_pool(q.unsqueeze(1), size, pool_mode).squeeze(1), eps, eps_mode)

    if students[0].dim() + student_is_map == 3:
        checks.tokens("attention_transfer_loss", students, teachers, teacher_is_map, student_is_map)
    with _no_autocast(students[0]):
        wide = _widen(*students, *teachers)
        terms = []
        for s, t in zip(wide[: len(students)], wide[len(students) :], strict=True):
            size = _smaller(s.shape[1 if student_is_map else 2 :], t.shape[1 if teacher_is_map else 2 :])
            s, t = graphs.save_constants(
                normalized(s, student_is_map, size), normalized(t, teacher_is_map, size)
            )
            d = (s - t).flatten(1)
            terms.append(d.square().mean() if difference == "squared" else _norm(d, 1).mean())
        return _combine(terms, weights, stage_reduce, weight)


def _self_attended(g: Tensor) -> Tensor:
    """The map g (N, H, H) and what its self-attention adds; the tokens are its rows."""
    rows = torch.softmax(g @ g.mT, 2)  # that over the columns is its transpose, since g g^T is symmetric
    return g + (rows + rows.mT) * g / math.sqrt(g.shape[2])


def _sakd(energies: list[Tensor], weights: Sequence[float] | None, weight: float) -> Tensor:
    """The loss from the energy maps, the student's first."""
    count = len(energies) // 2
    maps = [_normalize(_self_attended(g), 1e-12, "clamp") for g in energies]
    pairs = [graphs.save_constants(s, t) for s, t in zip(maps[:count], maps[count:], strict=True)]
    weights = [0.5 ** (count - 1 - i) for i in range(count)] if weights is None else weights
    return _combine([(s - t).square().mean() for s, t in pairs], weights, "sum", weight)


def sakd_map(x: Tensor) -> Tensor:
    """See :func:`fastkd.sakd_map`."""
    checks.sakd_map(x)
    with _no_autocast(x):
        return _self_attended(_widen(x)[0].square().mean(1))


def sakd_loss(
    student: Features, teacher: Features, *, weights: Sequence[float] | None = None, weight: float = 200.0
) -> Tensor:
    """See :func:`fastkd.sakd_loss`."""
    students, teachers = checks.sakd_loss(student, teacher, weights, weight)
    with _no_autocast(students[0]):
        return _sakd([x.square().mean(1) for x in _widen(*students, *teachers)], weights, weight)


def _gram(a: Tensor, b: Tensor, pool_mode: str, precision: str | None) -> Tensor:
    size = _smaller(a.shape[2:], b.shape[2:])
    a, b = _pool(a, size, pool_mode).flatten(2), _pool(b, size, pool_mode).flatten(2)
    dtype = a.dtype
    if a.is_cuda and precision in ("ieee", "tf32x3"):
        # PyTorch's setting is global and may be tf32: float64 keeps at least the precision that was asked for
        a, b = a.double(), b.double()
    return (a @ b.transpose(1, 2)).to(dtype) / a.shape[2]


def fsp_matrix(a: Tensor, b: Tensor, *, pool_mode: str = "avg", precision: str | None = None) -> Tensor:
    """See :func:`fastkd.fsp_matrix`."""
    checks.fsp_matrix(a, b, pool_mode, precision)
    with _no_autocast(a):
        a, b = _widen(a, b)
        return _gram(a, b, pool_mode, precision)


def fsp_loss(
    student: Features,
    teacher: Features,
    *,
    pool_mode: str = "avg",
    distance: str = "squared",
    pair_reduce: str = "sum",
    weights: Sequence[float] | None = None,
    weight: float = 1.0,
    precision: str | None = None,
) -> Tensor:
    """See :func:`fastkd.fsp_loss`."""
    students, teachers = checks.fsp_loss(
        student, teacher, pool_mode, distance, pair_reduce, weights, weight, precision
    )
    if students[0].dim() == 3:
        checks.tokens("fsp_loss", students, teachers)
    with _no_autocast(students[0]):
        wide = _widen(*students, *teachers)
        s, t = wide[: len(students)], wide[len(students) :]
        terms = []
        for i in range(len(s) - 1):
            grams = (_gram(side[i], side[i + 1], pool_mode, precision) for side in (s, t))
            s_gram, t_gram = graphs.save_constants(*grams)
            d = s_gram - t_gram
            if distance == "squared":
                terms.append(d.square().mean())
            elif distance == "frobenius":
                terms.append(d.square().sum((1, 2)).mean())
            else:
                terms.append(_norm(d, 1).sum((1, 2)).mean())
        return _combine(terms, weights, pair_reduce, weight)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    reduction: str = "batchmean",
    weight: float = 1.0,
    activation: str = "softmax",
    mask: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of softened answers, ``T^2 KL(softmax(t / T) || softmax(s / T))``.

    Args:
        student_logits, teacher_logits: (N, K) floating point, of any dtypes, K >= 2. A class of logit -inf in
            the teacher adds nothing; one of logit -inf in the student alone makes the loss +inf. With a mask
            (N, L, K) too, for tokens: the classes are last.
        temperature: T, above 0.
        reduction: "batchmean" (sum over classes, mean over N), "mean" (over N and K), "sum" or "none".
        weight: multiplies the result.
        activation: "softmax", or "sigmoid" for classes that exclude none of each other: the binary divergence
            of each class, ``p log(p / q) + (1 - p) log((1 - p) / (1 - q))`` with p = sigmoid(t / T) and
            q = sigmoid(s / T). K may be 1 then.
        mask: bool, (N,) for (N, K), (N, L) for (N, L, K). Where it is False neither sum nor mean counts the
            sample or token, whatever its logits; a mean over none is 0.

    Returns: a scalar, or the logits' shape for "none"; float32, float64 if any input is float64.
    Equals ``T * T * F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction=reduction)`` in float32.
    Raises: TypeError, ValueError for what is not such a pair of logits.
    Source: Hinton, Vinyals, Dean, *Distilling the knowledge in a neural network*, 2015.
    """
    checks.kd_loss(student_logits, teacher_logits, temperature, reduction, weight, activation, mask)
    temperature, weight = float(temperature), float(weight)
    with _no_autocast(student_logits):
        softened = [x / temperature for x in _widen(student_logits, teacher_logits)]
        if mask is not None:  # equal answers, so that neither the sum nor a gradient sees what is masked
            softened = [x.masked_fill(~mask.unsqueeze(-1), 0) for x in softened]
        s, t = graphs.save_constants(*(_log_probabilities(x, activation) for x in softened))
        # A class that the teacher excludes (a logit of -inf) has no part in the sum, whatever the student's
        # logit. In the others a probability that underflows stays above zero, so that a student's -inf makes
        # the loss infinite, not NaN. The teacher's logarithms, not its probabilities, so that a vanishing one
        # has a gradient.
        excluded = t == -math.inf
        p = t.exp().clamp_min(torch.finfo(t.dtype).tiny)
        kl = p * (t.masked_fill(excluded, 0) - s.masked_fill(excluded, 0))
        if activation == "sigmoid":
            kl = kl.sum(-1)
        factor = weight * temperature**2
        if reduction in ("none", "sum"):
            return (kl if reduction == "none" else kl.sum()) * factor
        if mask is None:
            return kl.mean() * factor if reduction == "mean" else kl.sum() * (factor / kl.shape[0])
        count = mask.sum().clamp_min(1) * (kl.shape[-1] if reduction == "mean" else 1)
        return kl.sum() / count * factor


def _log_probabilities(x: Tensor, activation: str) -> Tensor:
    """Of all classes (..., K), or of each class and its opposite (..., K, 2)."""
    if activation == "softmax":
        return F.log_softmax(x, -1)
    return torch.stack([F.logsigmoid(x), F.logsigmoid(-x)], -1)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    weight: float = 1.0,
) -> Tensor:
    """Reference of :func:`fastkd.rkd_loss`, which see: (N, N, D) differences and (N, N, N) cosines."""
    checks.rkd_loss(student, teacher, distance_weight, angle_weight, weight)
    with _no_autocast(student):
        sides = [x.flatten(1) for x in _widen(student, teacher)]
        away = [x[None] - x[:, None] for x in sides]  # [i, j] is e_j - e_i
        squares = [x.square().sum(2) for x in away]
        zero = [square == 0 for square in squares]
        lengths = [
            square.masked_fill(mask, 1).sqrt().masked_fill(mask, 0)
            for square, mask in zip(squares, zero, strict=True)
        ]
        loss = sides[0].new_zeros(())
        if distance_weight:
            means = [x.sum() / (~mask).sum().clamp_min(1) for x, mask in zip(lengths, zero, strict=True)]
            scaled = [x / torch.where(mean > 0, mean, 1) for x, mean in zip(lengths, means, strict=True)]
            loss = loss + weight * distance_weight * F.smooth_l1_loss(scaled[0], scaled[1])
        if angle_weight:
            units = [
                x / y.masked_fill(mask, 1)[..., None] for x, y, mask in zip(away, lengths, zero, strict=True)
            ]
            loss = loss + weight * angle_weight * F.smooth_l1_loss(
                units[0] @ units[0].mT, units[1] @ units[1].mT
            )
        return loss


def _crd_inputs(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    normalizers: Tensor | Sequence[float] | None,
) -> list[Tensor]:
    """The five tensors of :func:`fastkd.crd_loss` in one dtype; banks and normalizers as constants."""
    if normalizers is None:
        normalizers = (0.0, 0.0)
    if not isinstance(normalizers, Tensor):
        normalizers = torch.tensor(
            [float(value) for value in normalizers], dtype=torch.float32, device=student.device
        )
    return _widen(student, teacher, student_bank.detach(), teacher_bank.detach(), normalizers.detach())


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
    """Reference of :func:`fastkd.crd_loss`, which see, with the (N, K + 1, D) drawn rows of each bank."""
    checks.crd_loss(student, teacher, student_bank, teacher_bank, rows, temperature, normalizers, eps, weight)
    checks.crd_rows(rows, len(student_bank))
    temperature, eps = float(temperature), float(eps)
    with _no_autocast(student):
        s, t, s_bank, t_bank, given = _crd_inputs(student, teacher, student_bank, teacher_bank, normalizers)
        size, noise = len(s_bank), (rows.shape[1] - 1) / len(s_bank)
        loss, found = s.new_zeros(()), []
        for x, bank, z in ((s, t_bank, given[0]), (t, s_bank, given[1])):
            scores = (bank[rows] * x[:, None]).sum(2) / temperature
            z = torch.where(z > 0, z, scores.detach().exp().mean() * size)
            # log P; the others as log1p, since in float32 P + K / M would be rounded
            positive = scores[:, 0] - z.log()
            loss = loss + F.softplus(math.log(noise + eps) - positive, threshold=1000).sum()
            loss = loss + ((scores[:, 1:].exp() / z + eps) / noise).log1p().sum()
            found.append(z)
        return loss * (float(weight) / len(s)), torch.stack(found)


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The margins of :func:`ofd_loss`: for each channel of a batch norm the mean of what it sends below 0.

    Args:
        weight, bias: (C,), of the batch norm before the ReLU: its numbers are normal, of deviation s =
            abs(weight) and mean bias.

    Returns: (C,), at most 0; float32, float64 if any input is float64. With the standard density phi and its
    integral Phi ``bias - s * phi(bias / s) / Phi(-bias / s)``; -3 s where Phi(-bias / s) is at most 0.001;
    the smaller of bias and 0 where s is 0.
    Raises: TypeError, ValueError for what is not such a pair.
    Source: Heo et al., *A comprehensive overhaul of feature distillation*, ICCV 2019.
    """
    checks.ofd_margin(weight, bias)
    dtype = _widen(weight, bias)[0].dtype
    deviation, mean = weight.double().abs(), bias.double()
    constant = deviation == 0
    deviation = deviation.masked_fill(constant, 1)
    z = mean / deviation
    below = 0.5 * torch.erfc(z / math.sqrt(2))
    rare = below <= 0.001
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    margin = torch.where(rare, -3 * deviation, mean - deviation * density / below.masked_fill(rare, 1))
    return torch.where(constant, mean, margin).clamp_max(0).to(dtype)


def ofd_loss(
    student: Features,
    teacher: Features,
    margins: Features,
    *,
    weights: Sequence[float] | None = None,
    weight: float = 1e-3,
) -> Tensor:
    """Squared difference of maps before the ReLU, where the teacher's is raised to a margin.

    Args:
        student, teacher: (N, C, *S) floating point with one to three spatial dimensions, or several, one a
            stage; pairs of one shape.
        margins: (C,), or one for each stage; :func:`fastkd.ofd_margin` gives them. None may be above 0, which
            is checked on a CPU alone.
        weights: one factor a stage; None: 1 for the last stage, 1/2 for the one before it, and so on.
        weight: multiplies the result.

    Returns: a scalar; float32, float64 if any input is float64. With ``target = max(t, margin)`` each stage
    is ``((s - target) ** 2)[(s > target) | (target > 0)].sum() / N``.
    Raises: TypeError, ValueError for what is not such a pair.
    Source: Heo et al., *A comprehensive overhaul of feature distillation*, ICCV 2019, and its code.
    """
    students, teachers, bounds = checks.ofd_loss(student, teacher, margins, weights, weight)
    count = len(students)
    if students[0].dim() == 3:
        checks.tokens("ofd_loss", students, teachers)
    with _no_autocast(students[0]):
        wide, terms = _widen(*students, *teachers, *bounds), []
        for s, t, margin in zip(wide[:count], wide[count : 2 * count], wide[2 * count :], strict=True):
            s, target = graphs.save_constants(s, torch.maximum(t, margin.view(-1, *[1] * (t.dim() - 2))))
            reached = (s <= target) & (target <= 0)  # in this form a NaN stays one
            terms.append((s - target).masked_fill(reached, 0).square().sum() / s.shape[0])
        return _combine(
            terms,
            [0.5 ** (count - 1 - i) for i in range(count)] if weights is None else weights,
            "sum",
            weight,
        )


def hcl_loss(
    student: Features, teacher: Features, *, weights: Sequence[float] | None = None, weight: float = 1.0
) -> Tensor:
    """The hierarchical context loss of ReviewKD: mean squared differences at full size and of averages over
    coarser grids.

    Args:
        student, teacher: a tensor (N, C, H, W) or several, one a level; the shapes of a pair are the same.
            Any floating dtype.
        weights: one factor a level, 1 by default.
        weight: multiplies the result.

    Returns: a scalar; float32, float64 if any input is float64. The levels are summed.
    Of one level: ``mean((s - t)^2)`` with factor 1, then the same of both averaged to 4x4, 2x2 and 1x1. A
    grid is used where its side is smaller than H; the first that is used has the factor 1/2, each next one
    half of that. The sum is divided by that of the factors.
    Raises: TypeError, ValueError for what are not such pairs.
    Source: Chen, Liu, Zhao, Jia, *Distilling knowledge via knowledge review*, CVPR 2021.
    """
    students, teachers = checks.hcl_loss(student, teacher, weights, weight)
    with _no_autocast(students[0]):
        wide = _widen(*students, *teachers)
        terms = [_hcl_level(s - t) for s, t in zip(wide[: len(students)], wide[len(students) :], strict=True)]
        return _combine(terms, weights, "sum", weight)


def _hcl_level(difference: Tensor) -> Tensor:
    """Averages are linear, so those of the difference are the difference of the averages."""
    total, factor, factors = difference.square().mean(), 1.0, 1.0
    x, whole = difference, all(size % 4 == 0 for size in difference.shape[2:])
    for side in (4, 2, 1):
        if side < difference.shape[2]:
            factor /= 2
            factors += factor
            x = _grid(x if whole else difference, side)  # averages of equal parts may be averaged further
            total = total + factor * x.square().mean()
    return total / factors


def _grid(x: Tensor, side: int) -> Tensor:
    """``x`` averaged to (side, side). Equal parts are averaged faster by avg_pool2d, to the same numbers."""
    if all(size % side == 0 for size in x.shape[2:]):
        return F.avg_pool2d(x, [size // side for size in x.shape[2:]])
    return F.adaptive_avg_pool2d(x, side)
