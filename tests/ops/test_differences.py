"""The kernels of the losses of differences against the reference in float64, and what they may not do: depend
on threads, keep what they need not, or take a tensor that they would misread.
"""

from __future__ import annotations

import pytest
import torch
from autograd_cases import gradients
from recorder import Recorder

import fastkd
from fastkd import native, reference

MARGINS = torch.tensor([-0.3, 0.0, -1.5, -0.01, -0.7])


def ofd(module, *pairs):
    count = len(pairs) // 2
    margins = [MARGINS[: x.shape[1]].to(x.dtype if x.dtype == torch.float64 else None) for x in pairs[:count]]
    return module.ofd_loss(list(pairs[:count]), list(pairs[count:]), margins, weight=0.25)


def hcl(module, *pairs):
    count = len(pairs) // 2
    return module.hcl_loss(pairs[:count], pairs[count:], weight=0.5)


def sakd(module, *pairs):
    count = len(pairs) // 2
    return module.sakd_loss(pairs[:count], pairs[count:], weight=0.5)


HCL_SHAPES = [
    *((2, 5, 8, 8), (3, 2, 32, 32), (2, 3, 12, 28), (1, 2, 4, 4), (2, 3, 4, 16), (4, 37, 1, 1)),
    # sides that cannot be divided, or are shorter than a grid; channels that fill vectors, and not
    *((2, 37, 7, 7), (2, 3, 14, 9), (1, 2, 3, 8), (2, 18, 5, 2), (1, 16, 8, 8), (2, 3, 1, 4), (2, 2, 2, 2)),
]
SAKD_SHAPES = [(2, 5, 8, 8), (3, 2, 32, 32), (2, 37, 7, 7), (2, 3, 1, 1), (1, 9, 19, 19), (2, 16, 2, 2)]
LOSSES = {
    "hcl_loss": (hcl, HCL_SHAPES),
    "sakd_loss": (sakd, SAKD_SHAPES),
    "ofd_loss": (ofd, [(2, 5, 3, 3), (3, 5, 32, 33), (2, 3, 50), (1, 1, 1), (2, 2, 3, 4, 5), (4, 5, 1, 1)]),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def tensors(name, dtype=torch.float32, last=False):
    """The stages of every shape that the loss has, by the number of dimensions."""
    for shape in LOSSES[name][1]:
        pair = [torch.randn(shape).to(dtype) for _ in range(2)]
        if last:
            pair = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in pair]
        yield pair


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels-last"])
def test_the_kernels_match_float64_on_every_code_path(each_path, name, dtype, last):
    loss = LOSSES[name][0]
    cases = [*tensors(name, dtype, last)]
    exact = [gradients(lambda *x: loss(reference, *x), *(x.double() for x in pair)) for pair in cases]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
    for _ in each_path:
        for pair, wanted in zip(cases, exact, strict=True):
            with Recorder() as ran:
                found = gradients(lambda *x: loss(fastkd, *x), *pair)
            assert ran.fused == [name] and found[0].dtype == torch.float32
            torch.testing.assert_close(found[0].double(), wanted[0], rtol=2e-6, atol=1e-9)
            for x, got, want in zip(pair, found[1:], wanted[1:], strict=True):
                assert got.dtype == dtype and got.stride() == torch.empty_like(x).stride()
                torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=1e-6)


@every_loss
def test_bits_do_not_depend_on_threads_or_on_what_is_wanted(each_path, set_threads, name):
    loss = LOSSES[name][0]
    cases = [*tensors(name)]
    for _ in each_path:
        for student, teacher in cases:
            found = []
            for count in (1, 3):
                set_threads(count)
                found.append(gradients(lambda *x: loss(fastkd, *x), student, teacher))
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            for alone in (0, 1):
                sides = [student.clone(), teacher.clone()]
                sides[alone].requires_grad_()
                value = loss(fastkd, *sides)
                assert torch.equal(value, found[0][0])
                assert torch.equal(torch.autograd.grad(value, sides[alone])[0], found[0][1 + alone])
            assert torch.equal(loss(fastkd, student, teacher), found[0][0])


@every_loss
def test_upstream_gradients_and_further_passes(cpp, name):
    """The gradient is handed out by the last pass alone; every pass has its own factor."""
    loss = LOSSES[name][0]
    student, teacher = next(tensors(name))
    _, wanted, _ = gradients(lambda *x: loss(fastkd, *x), student, teacher)
    student.requires_grad_()
    value = loss(fastkd, student, teacher)
    for factor in (1.0, -3.0):
        (found,) = torch.autograd.grad(value, student, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(found, factor * wanted)
        found.zero_()
    value.backward(torch.tensor(2.0))
    torch.testing.assert_close(student.grad, 2 * wanted)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()
    (grad,) = torch.autograd.grad(loss(fastkd, student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"fastkd\.reference\.{name}"):
        grad.sum().backward()


@every_loss
def test_hooks_keep_what_they_were_given(cpp, name):
    loss, held = LOSSES[name][0], []
    student, teacher = next(tensors(name))
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        value = loss(fastkd, student, teacher)
    before = [x.clone() for x in held]
    value.backward(torch.tensor(3.0))
    assert all(map(torch.equal, held, before)) and {x.data_ptr() for x in held} >= {student.data_ptr()}
    assert sum(x.numel() for x in held) == 2 * student.numel()  # its gradient, and itself as it is


@every_loss
def test_it_is_one_graph(name):
    loss = LOSSES[name][0]
    pair = next(tensors(name))
    wanted = gradients(lambda *x: loss(fastkd, *x), *pair)
    for backend in ("auto", "cpp") if native.CPU.available else ("auto",):
        torch._dynamo.reset()
        with fastkd.use_backend(backend):
            compiled = torch.compile(lambda *x: loss(fastkd, *x), fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(gradients(compiled, *pair), wanted)


@every_loss
def test_what_the_kernels_do_not_take_goes_by_the_reference(cpp, name):
    loss = LOSSES[name][0]
    student, teacher = torch.randn(2, 5, 8, 8), torch.randn(2, 5, 8, 8)
    for pair in (
        (student.double(), teacher.double()),
        *([] if name == "sakd_loss" else [(student, teacher.half())]),
        (student.transpose(2, 3), teacher),
        (student[:, :, ::2, ::2], teacher[:, :, :4, :4]),
        (student[:1].expand(2, -1, -1, -1), teacher),
    ):
        with Recorder() as ran:
            found = gradients(lambda *x: loss(fastkd, *x), *pair)
        assert name not in ran.fused
        torch.testing.assert_close(found, gradients(lambda *x: loss(reference, *x), *pair))
    with Recorder() as ran, fastkd.use_backend("reference"):
        loss(fastkd, student, teacher)
    assert name not in ran.fused


@every_loss
def test_the_operator_refuses_what_it_would_misread(cpp, name):
    rest = {"ofd_loss": ([MARGINS], [1.0]), "hcl_loss": ([1.0],), "sakd_loss": ([1.0],)}[name]
    x = torch.randn(2, 5, 8, 8)
    op = getattr(torch.ops.fastkd, name)
    each = ((x, x[:1]), "student and teacher"), ((x, x.transpose(2, 3)), "teacher must be dense")
    wide = ((x.flatten(2)[..., None], x.flatten(2)[..., None]), r"student must be \(N, C, H, H\)")
    for pair, words in (
        ((x.double(), x.double()), "student must be float16, bfloat16 or float32"),
        *([*each, wide] if name == "sakd_loss" else ()),
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*([y] for y in pair), *rest, True, True)
    for pair, words in (
        ()
        if name == "sakd_loss"
        else (
            ((x, x.half()), "teacher must have the shape and dtype"),
            ((x, x[:1]), "teacher must have the shape and dtype"),
            ((x, x.transpose(2, 3)), "dense, and lie in memory alike"),
            ((x, x.to(memory_format=torch.channels_last)), "dense, and lie in memory alike"),
        )
    ):
        with pytest.raises(RuntimeError, match=words):
            op(*([y] for y in pair), *rest, True, True)
    with pytest.raises(RuntimeError, match="as many"):
        op([x], [x, x], *rest, True, True)
    for inputs in ([x.clone().requires_grad_()], [x]):
        torch.library.opcheck(op, (inputs, [x + 1], *rest, True, False))


def test_ofd_keeps_nan_and_infinity_and_halves_ties(each_path):
    """A NaN of either side stays one, and a number equal to its margin shares its gradient with it."""
    nan, inf = float("nan"), float("inf")
    s = torch.tensor([nan, 1.0, inf, -inf, 2.0, -5.0, 0.5, 0.0] * 5).view(1, 1, 40)
    t = torch.tensor([-2.0, nan, 1.0, 1.0, -0.5, -0.5, inf, -0.5] * 5).view(1, 1, 40)
    margin = torch.tensor([-0.5])

    def loss(module):
        return lambda s, t: module.ofd_loss(s, t, margin, weight=1.0)

    for _ in each_path:
        found, wanted = (gradients(loss(module), s, t) for module in (fastkd, reference))
        torch.testing.assert_close(found, wanted, equal_nan=True)
        assert found[0].isnan() and found[2][0, 0, 4] == -2.5 and found[1][0, 0, 5] == 0


def test_ofd_wants_margins_that_it_can_read(cpp):
    x, margins = torch.randn(2, 5, 8), MARGINS.clone().requires_grad_()
    assert fastkd.ofd_loss(x, x + 1, margins).requires_grad  # by the reference
    for given in (MARGINS[:4], MARGINS.double(), torch.cat([MARGINS, MARGINS])[::2], MARGINS[None]):
        with pytest.raises(RuntimeError, match="margins must be float32, dense, one number a channel"):
            torch.ops.fastkd.ofd_loss([x], [x], [given], [1.0], False, False)


def test_hcl_divides_the_levels(cpp):
    """Each goes the way that it can; float64 in one makes all float64, as in the reference."""
    shapes = [(2, 3, 8, 8), (2, 3, 7, 14), (2, 3, 2, 2), (2, 3, 16, 12), (2, 3, 1, 1), (2, 3, 1, 4)]
    sides = [[torch.randn(shape) for shape in shapes] for _ in range(2)]
    for side in sides:
        side[1] = side[1][..., ::2]  # no kernel takes it
    weights = [1.0, 0.5, 2.0, 3.0, 4.0, 5.0]

    def loss(module):
        return lambda *x: module.hcl_loss(x[:6], x[6:], weights=weights, weight=0.5)

    with Recorder() as ran:
        found = gradients(loss(fastkd), *sides[0], *sides[1])
    assert ran.fused == ["hcl_loss"]
    exact = gradients(loss(reference), *(x.double() for side in sides for x in side))
    torch.testing.assert_close([x.double() for x in found], exact, rtol=1e-5, atol=1e-7)
    with Recorder() as ran:
        mixed = fastkd.hcl_loss([sides[0][0], sides[0][1].double()], sides[1][:2])
    assert not ran.fused and mixed.dtype == torch.float64


def test_sakd_takes_sides_that_differ_and_empty_maps(each_path):
    """Channels, dtypes and layouts of student and teacher may differ. An empty map has no direction, and the
    other side's gradient is that of its own map.
    """
    student = torch.randn(3, 20, 9, 9).to(memory_format=torch.channels_last)
    teacher = torch.randn(3, 33, 9, 9).bfloat16()
    student[1], teacher[2] = 0, 0
    exact = gradients(lambda *x: sakd(reference, *x), student.double(), teacher.double())
    for _ in each_path:
        with Recorder() as ran:
            found = gradients(lambda *x: sakd(fastkd, *x), student, teacher)
        assert ran.fused == ["sakd_loss"] and found[2].dtype == torch.bfloat16
        torch.testing.assert_close(found[0].double(), exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found[2].double(), exact[2], rtol=8e-3, atol=1e-7)
        assert not found[1][1].any() and not found[2][2].any()


def test_sakd_keeps_nan_and_large_numbers(each_path):
    """Power sums of thousands: a softmax of one row's products, of which e^x by itself would be infinite."""
    large, other = 300 * torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8, 8)
    exact = gradients(lambda *x: sakd(reference, *x), large.double(), other.double())
    hole = other.clone()
    hole[0, 1, 2, 3] = float("nan")
    for _ in each_path:
        found = gradients(lambda *x: sakd(fastkd, *x), large, other)
        torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
        assert all(x.isfinite().all() for x in found)
        value, grad, _ = gradients(lambda *x: sakd(fastkd, *x), hole, large)
        assert value.isnan() and grad[0].isnan().all() and grad[1].isfinite().all()
