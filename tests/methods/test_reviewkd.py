"""ReviewKD: its loss and its modules against independent forms and the worked figures, its weight by pair,
its warm-up.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from review_cases import reviewed

import fastkd
from fastkd.methods.reviewkd import ABF


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def averaged(x, side):
    """(N, C, side, side): the mean of rows floor(i H / side) to ceil((i + 1) H / side), and of columns alike,
    part by part.
    """

    def part(i, size):
        return slice(i * size // side, -(-(i + 1) * size // side))

    rows = [
        [x[:, :, part(i, x.shape[2]), part(j, x.shape[3])].mean((2, 3)) for j in range(side)]
        for i in range(side)
    ]
    return torch.stack([torch.stack(row, 2) for row in rows], 2)


def hcl_by_hand(students, teachers):
    total = 0
    for s, t in zip(students, teachers, strict=True):
        grids = [side for side in (4, 2, 1) if side < s.shape[2]]
        terms = [
            ((s - t) ** 2).mean(),
            *(((averaged(s, side) - averaged(t, side)) ** 2).mean() for side in grids),
        ]
        factors = [0.5**i for i in range(len(terms))]
        total = total + sum(factor * term for factor, term in zip(factors, terms, strict=True)) / sum(factors)
    return total


def convolved(x, weight, bias=None):
    """A convolution with zeros around and stride 1, one shift of the kernel after the other."""
    side = weight.shape[2]
    r, (height, width) = side // 2, x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], height + 2 * r, width + 2 * r)
    padded[:, :, r : r + height, r : r + width] = x
    out = sum(
        torch.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], weight[:, :, i, j])
        for i, j in itertools.product(range(side), repeat=2)
    )
    return out if bias is None else out + bias[:, None, None]


def normed(x):
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def nearest(x, size):
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, x.shape[2:], strict=True))
    return x[:, :, rows][:, :, :, columns]


def by_hand(students, teachers, weights):
    """``weights``: of each level, the shallowest first, (1x1, 3x3) and, but for the deepest, the attention's
    weight and bias.
    """
    found, passed = [], None
    for x, t, (w1, w2, *attention) in reversed(list(zip(students, teachers, weights, strict=True))):
        x = normed(convolved(x, w1))
        if passed is not None:
            y = nearest(passed, x.shape[2:])
            z = 1 / (1 + (-convolved(torch.cat([x, y], 1), *attention)).exp())
            x = x * z[:, 0:1] + y * z[:, 1:2]
        passed = nearest(x, t.shape[2:])
        found.append(normed(convolved(passed, w2)))
    return hcl_by_hand(found, teachers[::-1])


def modules(weights):
    """The levels that the method has, with these weights."""
    levels = torch.nn.ModuleList()
    for w1, w2, *attention in weights:
        level = ABF(w1.shape[1], w1.shape[0], w2.shape[0], fuses=bool(attention)).double()
        level.conv1[0].weight, level.conv2[0].weight = torch.nn.Parameter(w1), torch.nn.Parameter(w2)
        if attention:
            level.attention.weight, level.attention.bias = map(torch.nn.Parameter, attention)
        levels.append(level)
    return levels


def test_the_worked_figures():
    for shape, wanted in (((2, 1, 8, 8), 0.1132009277), ((2, 2, 2, 2), 0.1414062500)):
        assert abs(fastkd.hcl_loss(worked(shape, 3), worked(shape, 5)).item() - wanted) <= 5e-11
    students, teachers = (
        [worked((2, 2, 4, 4), 3), worked((2, 2, 1, 1), 4)],
        [worked((2, 2, 4, 4), 5), worked((2, 2, 1, 1), 8)],
    )
    bias = torch.tensor([0.1, -0.2], dtype=torch.float64)
    shallow = (worked((2, 2, 1, 1), 6), worked((2, 2, 3, 3), 9), worked((2, 4, 1, 1), 4), bias)
    weights = [shallow, (worked((2, 2, 1, 1), 2), worked((2, 2, 3, 3), 7))]
    assert abs(reviewed(students, teachers, modules(weights)).item() - 1.7440825573) <= 5e-11
    assert abs(by_hand(students, teachers, weights).item() - 1.7440825573) <= 5e-11


@pytest.mark.parametrize("seed", range(30))
def test_the_loss_by_hand(seed):
    chosen = random.Random(seed)
    n = chosen.choice((1, 2, 5))
    shapes = [
        (n, chosen.choice((1, 2, 5)), *chosen.choices((1, 2, 3, 4, 5, 8, 11, 16), k=2))
        for _ in range(chosen.choice((1, 2, 4)))
    ]
    sides = [
        [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes] for _ in range(2)
    ]
    found, wanted = fastkd.hcl_loss(*sides, weight=0.5), 0.5 * hcl_by_hand(*sides)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    leaves = [*sides[0], *sides[1]]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_review_by_hand(seed):
    chosen = random.Random(seed)
    n, middle, count = chosen.choice((2, 3)), chosen.choice((1, 2, 5)), chosen.choice((2, 3))
    sizes = [[(height, width) for height, width in ((8, 7), (5, 4), (1, 1))[-count:]] for _ in range(2)]
    sizes[1] = [chosen.choice((size, (4, 6), (9, 3))) for size in sizes[1][:-1]] + [(1, 1)]
    widths = [chosen.choices((1, 2, 3, 5), k=count) for _ in range(2)]
    students, teachers = (
        [
            torch.randn(n, width, *size, dtype=torch.float64, requires_grad=True)
            for width, size in zip(*side, strict=True)
        ]
        for side in zip(widths, sizes, strict=True)
    )
    weights = []
    for i, (width_in, width) in enumerate(zip(*widths, strict=True)):
        shapes = [(middle, width_in, 1, 1), (width, middle, 3, 3), (2, 2 * middle, 1, 1), (2,)][
            : 4 if i < count - 1 else 2
        ]
        weights.append([torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes])
    levels = modules([[weight.detach() for weight in level] for level in weights])
    found, wanted = reviewed(students, teachers, levels), by_hand(students, teachers, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    ours = [
        [
            level.conv1[0].weight,
            level.conv2[0].weight,
            *(() if level.attention is None else level.attention.parameters()),
        ]
        for level in levels
    ]
    grads = torch.autograd.grad(found, [*students, *teachers, *itertools.chain(*ours)])
    exact = torch.autograd.grad(wanted, [*students, *teachers, *itertools.chain(*weights)])
    torch.testing.assert_close(grads, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_is_computed_in_float32(dtype):
    sides = [
        [(300 * torch.randn(3, 2, side, side)).to(dtype).requires_grad_() for side in (8, 1)]
        for _ in range(2)
    ]
    exact = hcl_by_hand(*([x.detach().double() for x in side] for side in sides))
    with torch.autocast("cpu", torch.bfloat16):
        found = fastkd.hcl_loss(*sides, weights=[1, 1])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    found.backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for side in sides for x in side)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"teacher": torch.ones(2, 3, 4, 5)},
            ValueError,
            r"student\[0\] .*teacher\[0\] .*wanted the same shape",
        ),
        ({"teacher": [torch.ones(2, 3, 4, 4)] * 2}, ValueError, "student has 1 stages, teacher has 2"),
        (
            {"student": torch.ones(2, 3, 4), "teacher": torch.ones(2, 3, 4)},
            ValueError,
            r"wanted \(N, C, H, W\)",
        ),
        ({"student": torch.ones(2, 3, 4, 4).int()}, TypeError, "student .*wanted float16"),
        ({"weights": [1.0, 2.0]}, ValueError, "weights has 2 numbers, wanted 1"),
        ({"weight": "x"}, TypeError, "weight"),
    ],
)
def test_bad_input_is_one_line(change, error, words):
    arguments = {"student": torch.ones(2, 3, 4, 4), "teacher": torch.ones(2, 3, 4, 4), **change}
    with pytest.raises(error, match=words) as caught:
        fastkd.hcl_loss(arguments.pop("student"), arguments.pop("teacher"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"warmup": 2.0}, "warmup is 2.0, wanted a fraction of the run"),
        ({"first": 5}, "first is 5, wanted 0 or 1"),
    ],
)
def test_options_that_cannot_be_are_refused(option, words):
    with pytest.raises(ValueError, match=f"option reviewkd: {words}"):
        fastkd.methods.define("reviewkd", options={"reviewkd": option})


def test_it_is_differentiable_and_a_module():
    x, y = (torch.randn(2, 1, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fastkd.hcl_loss, (x, y))
    torch.testing.assert_close(fastkd.HCL(weights=[3.0], weight=2.0)(x, y), 6 * fastkd.hcl_loss(x, y))
    assert fastkd.HCL.preset("reviewkd").weight == 1
