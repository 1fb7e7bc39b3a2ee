"""Properties that hold for any shape, stride, dtype and switch, on examples that hypothesis chooses."""

from __future__ import annotations

import math
import random

import pytest
import torch
from seed import SEED
from support import DTYPES, check, check_loss, ref, values

import fastkd

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("cpp", "one_thread")
relaxed = settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck), database=None)
switch = st.sampled_from
dtypes, weights = switch(DTYPES), st.floats(-4, 4).filter(lambda w: w == 0 or abs(w) > 1e-3)
# a map of few positions leaves little but rounding of its gradient
spaces = st.lists(st.integers(1, 9), min_size=1, max_size=3).filter(lambda space: math.prod(space) > 5)


@st.composite
def features(draw, n: int, channels: int, space: list[int], positive: bool = False) -> torch.Tensor:
    """A tensor of the wanted shape whose strides are any permutation, step, offset or repetition of a dense
    one.
    """
    shape = [n, channels, *space]
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(switch((1, 1, 1, 2, 3))) for _ in shape]
    offsets = [draw(switch((0, 0, 1))) for _ in shape]
    # not the space: two constant maps are equal, and their difference is rounding
    repeated = [draw(switch((False,) * 7 + (True,))) and d < 2 for d in range(len(shape))]
    # entropy drawn from hypothesis, so that a failing example can be repeated
    torch.manual_seed(draw(st.integers(0, 2**31)))
    held = [1 if again else size for size, again in zip(shape, repeated)]
    full = [size * step + offset for size, step, offset in zip(held, steps, offsets)]
    storage = values([full[d] for d in order], draw(dtypes), "positive" if positive else "normal")
    x = storage.permute([order.index(d) for d in range(len(shape))])
    x = x[
        tuple(slice(offset, offset + size * step, step) for size, step, offset in zip(held, steps, offsets))
    ]
    return x.expand(shape)


@seed(SEED)
@relaxed
@given(st.data())
def test_map_matches_the_reference_for_any_input(data):
    p, signed = data.draw(st.one_of(switch((1.0, 2.0, 3.0, 4.0)), st.floats(1, 5))), data.draw(st.booleans())
    shape = [data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40)), data.draw(spaces)]
    x = data.draw(features(*shape, positive=signed))
    options = dict(
        channel_reduce=data.draw(switch(("mean", "sum"))),
        signed=signed,
        normalize=data.draw(st.booleans()),
        eps=data.draw(switch((1e-12, 1e-6, 0.1))),
        eps_mode=data.draw(switch(("clamp", "add"))),
    )
    upstream = torch.randn(shape[0], *shape[2])
    check(
        "cpp",
        lambda x: fastkd.attention_map(x, p, **options),
        lambda x: ref.attention_map(x, p, **options),
        [x],
        upstream=upstream,
    )


@seed(SEED)
@relaxed
@given(st.data())
def test_transfer_loss_matches_the_reference_for_any_input(data):
    stages = data.draw(st.integers(1, 3))
    p = data.draw(st.one_of(switch((1.0, 2.0, 3.0)), st.floats(1, 4)))
    signed, difference = data.draw(st.booleans()), data.draw(switch(("squared", "l2")))
    student, teacher, n = [], [], data.draw(st.integers(1, 4))
    for _ in range(stages):
        space = data.draw(spaces)
        sizes = st.lists(st.integers(1, 9), min_size=len(space), max_size=len(space))
        other = data.draw(st.just(space) | sizes.filter(lambda other: math.prod(map(min, space, other)) > 5))
        for side, size in ((student, space), (teacher, other)):
            side.append(data.draw(features(n, data.draw(st.integers(1, 24)), size, positive=signed)))
    options = dict(
        p=p,
        signed=signed,
        difference=difference,
        channel_reduce=data.draw(switch(("mean", "sum"))),
        eps=data.draw(switch((1e-12, 0.1))),
        eps_mode=data.draw(switch(("clamp", "add"))),
        pool=data.draw(switch(("before", "after"))),
        pool_mode=data.draw(switch(("avg", "max"))),
        stage_reduce=data.draw(switch(("sum", "mean"))),
        weights=data.draw(st.none() | st.lists(weights, min_size=stages, max_size=stages)),
        weight=data.draw(weights),
    )
    needs = [data.draw(st.booleans()) for _ in range(2 * stages)]
    check_loss("cpp", "attention_transfer_loss", student, teacher, needs=needs, **options)


@seed(SEED)
@relaxed
@given(st.data())
def test_fsp_loss_matches_the_reference_for_any_input(data):
    stages, n, dims = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    size = st.lists(st.integers(1, 9), min_size=dims, max_size=dims)
    student, teacher, shared = [], [], data.draw(st.booleans())
    for _ in range(stages):
        channels, space = data.draw(st.integers(1, 40)), data.draw(size)
        student.append(data.draw(features(n, channels, space)))
        teacher.append(data.draw(features(n, channels, space if shared else data.draw(size))))
    options = dict(
        pool_mode=data.draw(switch(("avg", "max"))),
        distance=data.draw(switch(("squared", "frobenius", "column_l2"))),
        pair_reduce=data.draw(switch(("sum", "mean"))),
        weight=data.draw(weights),
        weights=data.draw(st.none() | st.lists(weights, min_size=stages - 1, max_size=stages - 1)),
    )
    needs = [data.draw(st.booleans()) for _ in range(2 * stages)]
    check_loss("cpp", "fsp_loss", student, teacher, needs=needs, **options)


@seed(SEED)
@relaxed
@given(st.data())
def test_fsp_matrix_matches_the_reference_for_any_input(data):
    n, dims = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    size = st.lists(st.integers(1, 9), min_size=dims, max_size=dims)
    a, b = (data.draw(features(n, data.draw(st.integers(1, 70)), data.draw(size))) for _ in range(2))
    pool_mode = data.draw(switch(("avg", "max")))
    upstream = torch.randn(n, a.shape[1], b.shape[1])
    terms = ref.fsp_matrix(a.abs().double(), b.abs().double(), pool_mode=pool_mode).max().item()
    ours, exact = (
        lambda a, b, f=f: f(a, b, pool_mode=pool_mode) for f in (fastkd.fsp_matrix, ref.fsp_matrix)
    )
    check("cpp", ours, exact, [a, b], upstream=upstream, output_terms=terms)


@seed(SEED)
@settings(relaxed, max_examples=10)
@given(st.data())
def test_loss_of_a_permuted_batch_or_channels_is_the_same(data):
    """Metamorphic: no element's place may matter; holds without any reference."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    n, c, space = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40)), data.draw(spaces)
    s, t = values((n, c, *space), torch.float64), values((n, c, *space), torch.float64)
    batch, channels = torch.randperm(n), torch.randperm(c)
    random.seed(0)
    with fastkd.use_backend("cpp"):
        for other_s, other_t in (
            (s[batch], t[batch]),
            (s[:, channels], t[:, channels]),
            (s.flip(-1), t.flip(-1)),
        ):
            for loss in (fastkd.attention_transfer_loss, lambda s, t: fastkd.fsp_loss([s, s], [t, t])):
                torch.testing.assert_close(loss(other_s, other_t), loss(s, t), rtol=1e-11, atol=1e-15)
