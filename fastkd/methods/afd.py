"""Attention-based feature distillation (Ji, Heo and Park, 2021): which block of the student follows which of
the teacher is learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.methods.base import Batch, Beside, BuildContext, Distiller, Output, Points, Preset, option
from fastkd.methods.connectors import averaged
from fastkd.models import Features, ResNet, WideResNet
from fastkd.ops.batch_norm import untouched
from fastkd.ops.pooled import pooled_map

_RESNET110 = 54  # blocks


class Attention(nn.Module):
    """(means of the student's maps over space, those of the teacher's) -> (N, T, S), the weights of the
    student's maps for each of the teacher's; they add up to 1.

    A mean gives, by a linear layer and batch norm, the query of a teacher's map and, with a
    ReLU, the key of a student's. One more linear layer and batch norm, over the rows of all keys together,
    make a key for each pair. The softmax is over the inner products of keys and queries and of learned
    positions, divided by the root of ``width``. In training the keys of pairs are never made, see
    :func:`products_with_normed`.
    """

    def __init__(self, students: Sequence[int], teachers: Sequence[int], width: int):
        super().__init__()
        self.width = width
        self.queries = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.BatchNorm1d(width)) for size in teachers
        )
        self.keys = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.BatchNorm1d(width), nn.ReLU()) for size in students
        )
        pairs = width * len(teachers)
        self.bilinear = nn.Sequential(nn.Linear(width, pairs), nn.BatchNorm1d(pairs))
        self.p_t, self.p_s = (nn.Parameter(torch.empty(len(side), width)) for side in (teachers, students))
        nn.init.xavier_normal_(self.p_t)
        nn.init.xavier_normal_(self.p_s)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        # the layers may be in half precision, in which means fit; products and softmax stay as wide as these
        own = self.p_t.dtype
        queries, keys = _vectors(self.queries, teachers, own), _vectors(self.keys, students, own)
        if keys[..., 0].numel() > 1 and untouched(self.bilinear, nn.Sequential) and plain(self.bilinear):
            products = products_with_normed(self.bilinear[0], self.bilinear[1], keys, queries)
        else:
            pairs = self.bilinear(keys.flatten(0, 1).to(own)).to(keys.dtype)
            pairs = pairs.view(*keys.shape[:2], len(teachers), self.width)
            products = (pairs * queries[:, None]).sum(3).mT
        return ((products + self.p_t @ self.p_s.T) / self.width**0.5).softmax(2)


def plain(layers: nn.Sequential) -> bool:
    """Whether they are PyTorch's own linear layer and a batch norm that takes the batch's moments and
    averages them.
    """
    if len(layers) != 2 or not untouched(layers[0], nn.Linear) or not untouched(layers[1], nn.BatchNorm1d):
        return False
    norm: Any = layers[1]
    return bool(norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None)


def products_with_normed(linear: Any, norm: Any, keys: Tensor, queries: Tensor) -> Tensor:
    """(N, T, S): the inner products of ``norm(linear(keys))``, (N S, T D) for ``keys`` (N, S, D), with
    ``queries`` (N, T, D). The running averages are updated.

    The norm is linear once the moments of its rows are known, and those of w x + b follow from those of x: w
    times the mean, and w C w for the covariance C. So each query goes back through the layer once, instead of
    each key through T of them: D D T products an image instead of D D T S, and nothing of the size of all
    pairs.
    """
    count, width = queries.shape[1:]
    mean = keys.mean((0, 1))
    centred = keys - mean
    rows, weight = centred.flatten(0, 1), linear.weight.to(centred.dtype)
    # a norm's own moments are float32 whatever precision products are allowed, which a graph cannot ask
    surely = not (rows.is_cuda or torch.compiler.is_compiling())
    wide = rows.dtype if surely and torch.get_float32_matmul_precision() == "highest" else torch.float64
    covariance = rows.mT.to(wide) @ rows.to(wide) / len(rows)
    variance = ((weight.to(wide) @ covariance) * weight).sum(1).clamp_min(0).to(rows.dtype)
    with torch.no_grad():
        norm.running_mean.lerp_(
            (weight.to(wide) @ mean.to(wide) + linear.bias).to(norm.running_mean), norm.momentum
        )
        unbiased = variance * (len(rows) / (len(rows) - 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var), norm.momentum)
        norm.num_batches_tracked.add_(1)
    slope = (norm.weight * (variance + norm.eps).rsqrt()).view(count, width)
    # the layer's bias goes with the mean: its gradient is 0, where none would spare it the weight decay
    shift = (norm.bias + (linear.bias - linear.bias)).view(count, width)
    back = (queries * slope).transpose(0, 1) @ weight.view(count, width, width)  # (T, N, D)
    return back.transpose(0, 1) @ centred.mT + (queries * shift).sum(2, keepdim=True)


def _vectors(layers: nn.ModuleList, means: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(N, number of maps, width), in the dtype of the means, by layers of another ``dtype``."""
    made = [layer(x.to(dtype)) for layer, x in zip(layers, means, strict=True)]
    return torch.stack(made, 1).to(means[0].dtype)


def weighted(attention: Attention, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """The differences of all pairs times their weights, summed, mean of the images. Each feature (N, C, H, W)
    is read once.
    """
    ours, theirs = ([pooled_map(x) for x in side] for side in (students, teachers))
    shares = attention([mean for _, mean in ours], [mean for _, mean in theirs])
    apart = differences([sums for sums, _ in ours], [sums for sums, _ in theirs])
    return (shares * apart).sum((1, 2)).mean()


def differences(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """(N, T, S): mean squared differences of attention maps of length 1, from the means of squares over
    channels, (N, H, W).

    A student's map is averaged to the teacher's size after the squaring; a smaller one is repeated. By inner
    products, all pairs of two sizes at once: of vectors, |s - t|^2 = |s|^2 + |t|^2 - 2 <s, t>.
    """
    ours, mine = _by_size(students)
    theirs, order = _by_size(teachers)
    theirs = [F.normalize(x.flatten(2), dim=2).view_as(x) for x in theirs]
    rows = [torch.cat([_distances(s, t) for s in ours], 2) for t in theirs]
    return torch.cat(rows, 1)[:, order][:, :, mine]


def _by_size(maps: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """(the maps of each size, (N, number, H, W); for each map its place among all of them)."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(maps):
        found.setdefault(tuple(x.shape[1:]), []).append(i)
    order = [i for group in found.values() for i in group]
    stacks = [torch.stack([maps[i] for i in group], 1) for group in found.values()]
    return stacks, [order.index(i) for i in range(len(maps))]


def _distances(s: Tensor, t: Tensor) -> Tensor:
    """(N, T, S) of maps (N, S, H, W) and, of length 1 or 0, (N, T, H', W')."""
    size, own = t.shape[2:], s.shape[2:]
    squares = t.square().sum((2, 3))
    repeats = [theirs // mine for mine, theirs in zip(own, size, strict=True)]
    if own != size and all(mine * k == theirs for mine, k, theirs in zip(own, repeats, size, strict=True)):
        # the product with a repeated map is that with the sums of what each number would meet; its length is
        # the root of the repeats times as large
        t = F.avg_pool2d(t, repeats) * math.prod(repeats) ** 0.5
    elif own != size:
        s = averaged(s, size)
    s = F.normalize(s.flatten(2), dim=2)
    products = t.flatten(2) @ s.mT
    return (squares[:, :, None] + s.square().sum(2)[:, None] - 2 * products) / size.numel()


class AFD(Distiller):
    """``beta`` times the differences of all pairs of a student's and a teacher's block, by learned weights.

    The maps are the outputs of every residual block after a ReLU, which in a wide ResNet follows the next
    batch norm; of a ResNet-110 those of every second one. The stem takes no part. Summed over the teacher's
    blocks. With KD of weight 0.9.
    """

    @dataclass(frozen=True)
    class Options:
        beta: float = option(200.0, "factor of the loss")
        width: int = option(128, "of queries and keys")

        def __post_init__(self) -> None:
            if self.width < 1:
                raise ValueError(f"width is {self.width}, wanted at least 1")

    title, colour = "AFD", "#999933"
    canonical = "afd"
    presets = {"afd": Preset({"beta": 200.0, "width": 128}, Beside(1.0, 0.9))}

    def __init__(self, context: BuildContext, options: Any):
        super().__init__(context, options)
        self.beta = options.beta
        self.is_wide = [isinstance(network, WideResNet) for network in (context.student, context.teacher)]
        self.student_points, self.teacher_points = (
            Points.PREACT if wide else Points.MAPS for wide in self.is_wide
        )
        shapes = (context.student_shapes.blocks, context.teacher_shapes.blocks)
        networks = (context.student, context.teacher)
        self.every_second = [
            isinstance(x, ResNet) and len(y) == _RESNET110 for x, y in zip(networks, shapes, strict=True)
        ]
        chosen = [
            blocks[1::2] if second else blocks
            for blocks, second in zip(shapes, self.every_second, strict=True)
        ]
        students, teachers = ([int(shape[0]) for shape in side] for side in chosen)
        if not students or not teachers:
            raise ValueError(
                f"student shows {len(students)} blocks and teacher {len(teachers)}: afd wanted at least one"
                " of each, name submodules"
            )
        self.attention = Attention(students, teachers, options.width)

    def loss(self, batch: Batch, student: Output, teacher: Output, connected: Any) -> Tensor:
        students, teachers = self.blocks(student.features, 0), self.blocks(teacher.features, 1)
        return self.beta * weighted(self.attention, students, teachers)

    def blocks(self, features: Features, role: int) -> list[Tensor]:
        """The maps of the student (0) or the teacher (1)."""
        found = [F.relu(x) for x in features.preact.blocks] if self.is_wide[role] else list(features.blocks)
        return found[1::2] if self.every_second[role] else found
