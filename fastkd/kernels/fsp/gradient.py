"""Gradients of FSP matrices and of the FSP loss: one launch for all features of a chain, see `forward.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd._bits import FSP
from fastkd.kernels import interpreting
from fastkd.kernels.common.launch import Launch, Plans, key_of
from fastkd.kernels.common.windows import empty_pooled, pooled_strides
from fastkd.kernels.fsp.gradient_kernels import fsp_gradient_kernel
from fastkd.kernels.fsp.pool import spread
from fastkd.kernels.fsp.saved import common_size, wide_stages
from fastkd.kernels.fsp.terms import Term, check_saved, term_of
from fastkd.kernels.fsp.view import (
    ONES,
    Sources,
    added_up,
    checked,
    mode,
    narrowed,
    options,
    owned,
    tight,
    tile,
    view,
    warps,
    window,
)

_plans = Plans()


class _Gradients:
    """Gradients of some features, each a sum of terms."""

    def __init__(
        self,
        features: Sequence[Tensor],
        wanted: Sequence[tuple[int, Sequence[Term]]],
        pool_mode: str,
        how: str,
        sign: float,
    ) -> None:
        self.sources = Sources(features, max_pool=pool_mode == "max")
        self.ms: list[int] = []
        self.xs: list[int | None] = []
        # of each item: (wanted,) or, for a term by itself, (wanted, its size)
        self.outs: list[tuple[int, ...]] = []
        # (wanted, items of its terms, pools of their maxima)
        self.spread: list[tuple[int, list[int], list[int | None]]] = []
        views, kinds, numbers, scales, cuts, out_views = [], [], [], [], [], []
        sizes = []  # of each item: its channels, its positions
        samples = features[0].shape[0]

        def add(term: Term, parts: tuple[int, ...], share: int) -> None:
            same = len(set(term.factors)) == 1
            kinds.append((len(self.xs), term.kind, term.left, int(same) if term.factors else term.sign))
            self.ms.append(term.m)
            numbers.append(term.numbers)
            scales.append(sign / (math.prod(term.common) * share))
            for at, i in enumerate(term.xs):
                # of the factors of a square or of a matrix, all positions are multiplied
                factor = term.kind == 1 or at > 0
                common = term.factors[at > 2] if term.kind == 2 and factor else term.common
                place, seen = self.sources.add(i, common, ONES if factor else parts)
                self.xs.append(place)
                views.append(seen)
            for strides in term.strides:
                self.xs.append(None)
                views.append(view((samples, term.depth, *term.common), strides, torch.float32, ONES, parts))

        def item(i: int, terms: Sequence[Term], grid: tuple[int, ...], out: tuple[int, ...]) -> None:
            """A gradient on its own grid or, of parts, on the grid of its pooled terms."""
            x = features[i]
            own = x.shape[2:] if len(out) == 1 else out[1:]
            coarse = [t for t in terms if window(own, t.common, max_pool=False) == grid]
            fine = [t for t in terms if t not in coarse]
            first, first_view = len(kinds), len(views)
            for term in coarse:
                add(term, ONES, math.prod(grid))
            for term in fine:
                add(term, grid, 1)
            if len(out) == 1:
                like = torch.empty_like(x, device="meta")
                out_view = view(x.shape, like.stride(), x.dtype, ONES, grid)
            else:
                target = (*x.shape[:2], *own)
                out_view = view(target, pooled_strides(x, target), torch.float32)
            positions = math.prod(own) // math.prod(grid)
            register_heavy = any(v.register_heavy for v in views[first_view:])
            widest = 64 if (coarse and fine) or out_view.scalar else 128
            # a matrix recomputed is a third block in registers
            highest, kind = 128, max(t.kind for t in terms)
            if how in ("ieee", "tf32x3") and kind:
                highest, widest = 32 if kind == 2 else 128, 32
            elif kind:
                highest, widest = 64, 64 if kind == 2 else widest
            cut = tile(
                min(x.shape[1], highest),
                positions,
                max(t.depth for t in terms),
                how,
                register_heavy=register_heavy,
                widest=widest,
                gradient=True,
            )
            cuts.append((*cut, first, len(coarse), len(fine)))
            sizes.append((x.shape[1], positions))
            out_views.append(out_view)
            self.outs.append(out)

        for at, (i, terms) in enumerate(wanted):
            windows = [window(features[i].shape[2:], t.common, max_pool=self.sources.max_pool) for t in terms]
            grids = {of or () for of in windows} - {ONES}
            if not grids or (len(grids) == 1 and () not in grids):
                item(i, terms, (grids or {ONES}).pop(), (at,))
                continue
            # each term at its own size first
            places = []
            for term, of in zip(terms, windows):
                pooled = self.sources.max_pool and of is None
                places.append(self.sources.add(i, term.common)[0] if pooled else None)
                item(i, [term], ONES, (at, *term.common))
            self.spread.append((at, list(range(len(sizes) - len(terms), len(sizes))), places))
        many, items, programs = warps(cuts, how), [], 0
        cuts = [narrowed(cut, many) for cut in cuts]
        scarce = tight(how, many, through=any(kind == 2 for _, kind, *_ in kinds))
        for at, ((channels, positions), cut) in enumerate(zip(sizes, cuts)):
            first, count = cut[3], cut[4] + cut[5]
            made = {kind for _, kind, *_ in kinds[first : first + count]}
            if added_up(how, any(made)):
                cuts[at] = cut = owned(cut, many, channels, positions, through=2 in made)
            blocks = math.ceil(positions / cut[1])
            tiles = math.ceil(channels / cut[0]) * blocks
            items.append((programs, tiles, blocks))
            programs += samples * tiles
        self.wanted = [i for i, _ in wanted]
        self.launch = Launch(
            fsp_gradient_kernel,
            programs,
            tuple(numbers),
            tuple(v.numbers for v in views),
            tuple(v.numbers for v in out_views),
            tuple(items),
            tuple(scales),
            samples,
            tuple(v.config for v in views),
            tuple(v.config for v in out_views),
            tuple(kinds),
            tuple(cuts),
            len(items),
            how,
            interpreting(),
            **options(how, many, gradient=True, tight=scarce),
        )

    def run(self, grad: Tensor | None, features: Sequence[Tensor], ms: Sequence[Tensor]) -> list[Tensor]:
        made = self.sources.made(features)
        xs, given = (
            tuple([None if i is None else made[i][0] for i in self.xs]),
            tuple([ms[i] for i in self.ms]),
        )
        out = [torch.empty_like(features[i]) for i in self.wanted]
        to = []
        for at, *size in self.outs:
            x = features[self.wanted[at]]
            to.append(empty_pooled(x, (*x.shape[:2], *size), x.device) if size else out[at])
        upstream = () if grad is None else (grad,)
        self.launch((*upstream, *[x for x in xs if x is not None], *given), grad, given, xs, tuple(to))
        for at, items, places in self.spread:
            spread(
                [(to[item], None if place is None else made[place][1]) for item, place in zip(items, places)],
                out[at],
            )
        return out


def fsp_loss_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    matrix_grads: Sequence[Tensor],
    options: int,
    stages: Sequence[int],
    others: Sequence[Tensor],
) -> list[Tensor]:
    """See ``torch.ops.fastkd.fsp_loss_backward``."""
    if not stages:
        return []
    tensors = (*features, *others)
    how = mode(tensors, FSP.value(options, "precision"))
    key = ("gradients", key_of(tensors), key_of(matrix_grads), grad.dtype, options, how, tuple(stages))
    plan = _plans.get(key)
    if plan is None:
        names = [
            f"{of}[{i}]"
            for of, chain in (("features", features), ("others", others))
            for i in range(len(chain))
        ]
        FSP.check(options)
        checked(tensors, names)
        pool_mode, negate = FSP.value(options, "pool_mode"), FSP.value(options, "negate")
        if len(features) < 2 or len(matrix_grads) != len(features) - 1:
            raise ValueError("matrix_grads must hold one matrix a pair of features")
        wide = wide_stages(matrix_grads)
        if len(others) != len(wide) or any(x.shape[1] != features[i].shape[1] for i, x in zip(wide, others)):
            raise ValueError(f"others must hold stages {wide} of the other chain, got {len(others)} features")
        for i, m in enumerate(matrix_grads):
            check_saved(m, features[i], features[i + 1], f"matrix_grads[{i}]")
        # student's and teacher's features of a stage
        places = {i: (i, len(features) + k)[:: -1 if negate else 1] for k, i in enumerate(wide)}
        wanted = []
        for i in stages:
            if not 0 <= i < len(features):
                raise ValueError(f"stages must be indices of features, got {i}")
            pairs = [pair for pair in (i - 1, i) if 0 <= pair < len(matrix_grads)]
            wanted.append(
                (i, [term_of(tensors, matrix_grads, i, pair, places, teacher=negate) for pair in pairs])
            )
        plan = _plans[key] = _Gradients(tensors, wanted, pool_mode, how, -1.0 if negate else 1.0)
    return plan.run(grad, tensors, matrix_grads)


def fsp_matrix_backward(grad: Tensor, a: Tensor, b: Tensor, options: int) -> list[Tensor]:
    """See ``torch.ops.fastkd.fsp_matrix_backward``."""
    needs = FSP.value(options, "a_grad"), FSP.value(options, "b_grad")
    if not any(needs):
        return []
    how = mode((a, b), FSP.value(options, "precision"))
    key = ("matrix gradients", key_of((grad, a, b)), options, how)
    plan = _plans.get(key)
    if plan is None:
        FSP.check(options)
        checked((a, b), "ab")
        if grad.dim() != 3:
            raise ValueError(f"grad must hold a matrix a sample, got {tuple(grad.shape)}")
        check_saved(grad, a, b, "grad")
        n, rows, columns = grad.stride()
        common = common_size(a, b)
        both = [
            (0, [Term(common, (1,), 0, (n, rows, columns), b.shape[1])]),
            (1, [Term(common, (0,), 0, (n, columns, rows), a.shape[1])]),
        ]
        wanted = [job for job, need in zip(both, needs) if need]
        plan = _plans[key] = _Gradients((a, b), wanted, FSP.value(options, "pool_mode"), how, 1.0)
    return plan.run(None, (a, b), (grad,))
