"""OFD against an independent form and its worked figures; its margins, and what does not fit it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from ofd_cases import by_hand, margin_by_hand

import fastkd
from fastkd import reference
from fastkd.models import create_model


def worked(shape, a):
    numbers = torch.arange(torch.Size(shape).numel())
    return (((numbers * a) % 11 - 5).double() / 10).view(shape)


def gradients(loss, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = loss(*leaves)
    return [out, *torch.autograd.grad(out, leaves)]


def test_the_worked_figures():
    assert reference.ofd_margin is fastkd.ofd_margin
    weight, bias = (torch.tensor(x, dtype=torch.float64) for x in ((1.0, -0.5, 1.0), (0.2, -0.3, 4.0)))
    wanted = torch.tensor([-0.7294158481, -0.5295735683, -3.0], dtype=torch.float64)
    assert (fastkd.ofd_margin(weight, bias) - wanted).abs().max() <= 5e-11
    student, teacher = worked((2, 2, 2, 2), 3), worked((2, 2, 2, 2), 5)
    margins = torch.tensor([-0.1, -0.2], dtype=torch.float64)
    found = fastkd.ofd_loss(student, teacher, margins, weight=1.0)
    assert abs(2 * found.item() - 2.91) <= 5e-11  # the figure is the sum over the two samples
    stages = fastkd.ofd_loss([student] * 3, [teacher] * 3, [margins] * 3)
    assert stages.item() == pytest.approx(found.item() * 1.75 / 1000, rel=1e-14)


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients_by_hand(seed):
    chosen = random.Random(seed)
    count, n = chosen.choice((1, 2, 3)), chosen.choice((1, 2, 5))
    shapes = [
        (n, chosen.choice((1, 3, 7)), *(chosen.choice((1, 3, 5)) for _ in range(chosen.choice((1, 2, 3)))))
        for _ in range(count)
    ]
    students, teachers = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    margins = [-torch.rand(shape[1], dtype=torch.float64) for shape in shapes]
    weights = chosen.choice((None, [0.5 + i for i in range(count)]))
    used = [2.0 ** (i + 1 - count) for i in range(count)] if weights is None else weights
    pair = [*students, *teachers]
    found = gradients(
        lambda *x: fastkd.ofd_loss(x[:count], x[count:], margins, weights=weights, weight=0.25), *pair
    )
    wanted = gradients(lambda *x: 0.25 * by_hand(x[:count], x[count:], margins, used), *pair)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


def test_margins_by_hand():
    pairs = [
        (0.0, 0.4),
        (0.0, -0.4),
        (1e-30, 1.0),
        (-1.0, 3.0902),
        (1.0, 3.0904),
        *((random.gauss(0, 1), random.gauss(0, 2)) for _ in range(40)),
    ]
    weight, bias = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = fastkd.ofd_margin(weight, bias)
    torch.testing.assert_close(
        found,
        torch.tensor([margin_by_hand(*pair) for pair in pairs], dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )
    assert found.max() <= 0 and not math.copysign(1, found[2]) > 0
    half = fastkd.ofd_margin(weight.half(), bias.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), fastkd.ofd_margin(weight.half().double(), bias.half().double()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_is_computed_in_float32(dtype):
    pair = [(100 * torch.randn(3, 5, 7, 6)).to(dtype) for _ in range(2)]
    margins = -torch.rand(5)
    found = gradients(lambda s, t: fastkd.ofd_loss(s, t, margins), *pair)
    wanted = gradients(
        lambda s, t: by_hand([s], [t], [margins.double()], [1e-3]), *(x.double() for x in pair)
    )
    assert found[0].dtype == torch.float32 and [x.dtype for x in found[1:]] == [dtype] * 2
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastkd.ofd_loss(*pair, margins), found[0])


def test_a_nan_is_not_masked_away():
    student = torch.full((1, 1, 2), float("nan"))
    assert fastkd.ofd_loss(student, -torch.ones(1, 1, 2), torch.tensor([-0.5])).isnan()


def test_the_module_is_one_graph_and_moves_its_margins():
    student, teacher = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    module = fastkd.OFD.preset("mdistiller", margins=-torch.rand(4), weight=0.5)
    compiled = torch.compile(lambda s: module(s * 2, teacher), fullgraph=True, backend="aot_eager")
    wanted = gradients(lambda s: fastkd.ofd_loss(s * 2, teacher, module.margin_0, weight=0.5), student)
    torch.testing.assert_close(gradients(compiled, student), wanted)
    assert module.double().margin_0.dtype == torch.float64 and [*module.state_dict()] == ["margin_0"]
    assert torch.autograd.gradcheck(module, (student.double(), teacher.double().requires_grad_()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"margins": [-torch.ones(3)]}, ValueError, "margins has 1, wanted 2, one a stage"),
        (
            {"margins": [-torch.ones(3), torch.tensor([-1.0, 0.5, 0.0])]},
            ValueError,
            r"margins\[1\] has 0.5, wanted numbers of at most 0",
        ),
        (
            {"margins": [-torch.ones(3), -torch.ones(2)]},
            ValueError,
            r"margins\[1\] is \(2,\) .* one number a channel",
        ),
        (
            {"margins": [-torch.ones(3), -torch.ones(3, 1)]},
            ValueError,
            r"margins\[1\] is \(3, 1\) .* wanted \(C,\)",
        ),
        ({"margins": [-torch.ones(3), [-1.0]]}, TypeError, r"margins\[1\] is list, wanted a tensor"),
        (
            {"student": [torch.ones(2, 3, 4), torch.ones(2, 3, 5)]},
            ValueError,
            r"student\[1\] .* teacher\[1\] .* shapes differ",
        ),
        ({"teacher": [torch.ones(2, 3, 4)]}, ValueError, "student has 2 stages, teacher has 1"),
        ({"weights": [1.0]}, ValueError, "weights has 1 numbers, wanted 2"),
        ({"weight": "x"}, TypeError, "weight is"),
        (
            {"student": torch.ones(2, 3, 4).long(), "teacher": torch.ones(2, 3, 4)},
            TypeError,
            "student is .* wanted float16",
        ),
    ],
)
def test_bad_input_is_one_line(change, error, words):
    pair = [torch.ones(2, 3, 4)] * 2
    arguments = {"student": pair, "teacher": pair, "margins": [-torch.ones(3)] * 2, **change}
    with pytest.raises(error, match=words) as caught:
        fastkd.ofd_loss(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_margins_are_one_line():
    with pytest.raises(ValueError, match=r"weight is \(3,\) .*, bias is \(2,\) .*: wanted the same channels"):
        fastkd.ofd_margin(torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match="bias is float, wanted a tensor"):
        fastkd.ofd_margin(torch.ones(3), 1.0)
    with pytest.raises(ValueError, match=r"margins\[0\] has 2, wanted numbers of at most 0"):
        fastkd.OFD(2 * torch.ones(3))
    with pytest.raises(
        ValueError,
        match="student's stage 1 is .*28, 28.*, teacher's is .*32, 32.*: ofd wanted maps of one size",
    ):
        fastkd.Distillation(create_model("resnet_32_20"), create_model("resnet8"), "ofd")
