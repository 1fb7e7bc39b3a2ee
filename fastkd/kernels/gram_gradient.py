"""Gradients of FSP matrices and of the FSP loss: all features of a chain in one launch, as `gram.py` says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels import interpreting
from fastkd.kernels.gram_kernels import fsp_gradient_kernel
from fastkd.kernels.gram_pool import spread
from fastkd.kernels.gram_view import ONES, Sources, checked, common_size, mode, tile, view, warps, window
from fastkd.kernels.launch import Launch, Plans, key_of
from fastkd.kernels.pool import _empty as empty
from fastkd.kernels.pool import pooled_strides

_plans = Plans()


class _Gradients:
    """Gradients of some features, each a sum of terms M x.

    A term: (place of x, common size, place of M, strides of M by sample, channel of the gradient, channel of x).
    """

    def __init__(
        self, features: Sequence[Tensor], wanted: Sequence[tuple[int, Sequence[Any]]], pool_mode: str, how: str, sign: float
    ) -> None:  # fmt: skip
        self.sources = Sources(features, max_pool=pool_mode == "max")
        self.ms: list[int] = []
        self.xs: list[int] = []
        self.outs: list[tuple[int, ...]] = []  # of each item: (wanted,) or, for a term by itself, (wanted, its size)
        self.spread: list[tuple[int, list[int], list[int | None]]] = []  # (wanted, items of its terms, pools of their maxima)
        views, strides, scales, cuts, items, out_views = [], [], [], [], [], []
        samples, programs = features[0].shape[0], 0

        def item(i: int, terms: Sequence[tuple], grid: tuple[int, ...], out: tuple[int, ...]) -> None:
            """A gradient on its own grid or, of parts, on the grid of its pooled terms."""
            nonlocal programs
            x = features[i]
            own = x.shape[2:] if len(out) == 1 else out[1:]
            coarse = [t for t in terms if window(own, t[1], max_pool=False) == grid]
            fine = [t for t in terms if t not in coarse]
            first = len(self.xs)
            for term in (*coarse, *fine):
                other, common, m, m_strides = term
                place, seen = self.sources.add(other, common, ONES if term in coarse else grid)
                self.xs.append(place)
                self.ms.append(m)
                views.append(seen)
                strides.append(m_strides)
                scales.append(sign / (math.prod(common) * (math.prod(grid) if term in coarse else 1)))
            if len(out) == 1:
                like = torch.empty_like(x, device="meta")
                out_view = view(x.shape, like.stride(), x.dtype, ONES, grid)
            else:
                target = (*x.shape[:2], *own)
                out_view = view(target, pooled_strides(x, target), torch.float32)
            positions = math.prod(own) // math.prod(grid)
            depth = max(features[t[0]].shape[1] for t in terms)
            dear = any(v.dear for v in views[first:])
            cut = tile(x.shape[1], positions, depth, how, dear=dear, narrow=bool(coarse and fine) or out_view.scalar)
            cuts.append((*cut, first, len(coarse), len(fine)))
            blocks = math.ceil(positions / cut[1])
            tiles = math.ceil(x.shape[1] / cut[0]) * blocks
            items.append((programs, tiles, blocks))
            programs += samples * tiles
            out_views.append(out_view)
            self.outs.append(out)

        for at, (i, terms) in enumerate(wanted):
            windows = [window(features[i].shape[2:], t[1], max_pool=self.sources.max_pool) for t in terms]
            grids = {of or () for of in windows} - {ONES}
            if not grids or (len(grids) == 1 and () not in grids):
                item(i, terms, (grids or {ONES}).pop(), (at,))
                continue
            # each term at its own size first
            places = []
            for term, of in zip(terms, windows):
                pooled = self.sources.max_pool and of is None
                places.append(self.sources.add(i, term[1])[0] if pooled else None)
                item(i, [term], ONES, (at, *term[1]))
            self.spread.append((at, list(range(len(items) - len(terms), len(items))), places))
        self.wanted = [i for i, _ in wanted]
        self.launch = Launch(
            fsp_gradient_kernel, programs, tuple(strides), tuple(v.numbers for v in views), tuple(v.numbers for v in out_views),
            tuple(items), tuple(scales), samples, tuple(v.config for v in views), tuple(v.config for v in out_views), tuple(cuts),
            len(items), how, interpreting(), num_warps=warps(cuts),
        )  # fmt: skip

    def run(self, grad: Tensor | None, features: Sequence[Tensor], ms: Sequence[Tensor]) -> list[Tensor]:
        made = self.sources.made(features)
        xs, given = tuple([made[i][0] for i in self.xs]), tuple([ms[i] for i in self.ms])
        out = [torch.empty_like(features[i]) for i in self.wanted]
        to = []
        for at, *size in self.outs:
            x = features[self.wanted[at]]
            to.append(empty(x, (*x.shape[:2], *size), x.device) if size else out[at])
        upstream = () if grad is None else (grad,)
        self.launch((*upstream, *xs, *given), grad, given, xs, tuple(to))
        for at, items, places in self.spread:
            spread([(to[item], None if place is None else made[place][1]) for item, place in zip(items, places)], out[at])
        return out


def fsp_loss_backward(
    grad: Tensor, features: Sequence[Tensor], gram_grads: Sequence[Tensor], pool_mode: str, precision: str | None, stages: Sequence[int],
    negate: bool,
) -> list[Tensor]:  # fmt: skip
    """See ``torch.ops.fastkd.fsp_loss_backward``."""
    if not stages:
        return []
    how = mode(features, precision)
    key = ("gradients", key_of(features), key_of(gram_grads), pool_mode, precision, how, tuple(stages), negate)
    plan = _plans.get(key)
    if plan is None:
        checked(features, [f"features[{i}]" for i in range(len(features))], pool_mode, precision)
        if len(features) < 2 or len(gram_grads) != len(features) - 1:
            raise ValueError("gram_grads must hold one matrix a pair of features")
        for i, m in enumerate(gram_grads):
            _check_matrix(m, features[i], features[i + 1], f"gram_grads[{i}]")
        wanted = []
        for i in stages:
            if not 0 <= i < len(features):
                raise ValueError(f"stages must be indices of features, got {i}")
            terms: list[Any] = []
            if i > 0:
                n, a, b = gram_grads[i - 1].stride()
                terms.append((i - 1, common_size(features[i - 1], features[i]), i - 1, (n, b, a)))
            if i < len(gram_grads):
                terms.append((i + 1, common_size(features[i], features[i + 1]), i, gram_grads[i].stride()))
            wanted.append((i, terms))
        plan = _plans[key] = _Gradients(features, wanted, pool_mode, how, -1.0 if negate else 1.0)
    return plan.run(grad, features, gram_grads)


def _check_matrix(m: Tensor, a: Tensor, b: Tensor, name: str) -> None:
    if m.dtype != torch.float32 or m.shape != (a.shape[0], a.shape[1], b.shape[1]) or m.device != a.device:
        raise ValueError(f"{name} is {tuple(m.shape)} {m.dtype} on {m.device}, wanted {(a.shape[0], a.shape[1], b.shape[1])} float32")


def fsp_matrix_backward(
    grad: Tensor, a: Tensor, b: Tensor, pool_mode: str, precision: str | None, a_grad: bool, b_grad: bool
) -> list[Tensor]:
    """See ``torch.ops.fastkd.fsp_matrix_backward``."""
    if not (a_grad or b_grad):
        return []
    how = mode((a, b), precision)
    key = ("matrix gradients", key_of((grad, a, b)), pool_mode, precision, how, a_grad, b_grad)
    plan = _plans.get(key)
    if plan is None:
        checked((a, b), "ab", pool_mode, precision)
        _check_matrix(grad, a, b, "grad")
        n, rows, columns = grad.stride()
        common = common_size(a, b)
        both = [(0, [(1, common, 0, (n, rows, columns))]), (1, [(0, common, 0, (n, columns, rows))])]
        wanted = [job for job, need in zip(both, (a_grad, b_grad)) if need]
        plan = _plans[key] = _Gradients((a, b), wanted, pool_mode, how, 1.0)
    return plan.run(None, (a, b), (grad,))
