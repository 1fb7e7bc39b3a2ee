"""How the operations live in a training loop: gradients of every kind, autocast, accumulation, inference
mode, several processes.
"""

from __future__ import annotations

import random
import socket

import pytest
import torch
from autograd_cases import TRAINING, agree
from child_process import ranks
from support import evaluate, make, ref, values

import fastkd

pytestmark = pytest.mark.usefixtures("one_thread")
F64 = torch.float64
STAGES = 3


def chains(dtype=torch.float32, layout="contiguous"):
    return tuple([make((4, c, n, n), dtype, layout) for c, n in ((3, 8), (5, 4), (6, 2))] for _ in range(2))


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    "p, signed, difference, pool",
    [
        (2, False, "squared", "before"),
        (3, True, "l2", "after"),
        (2.7, False, "l2", "before"),
        (1, False, "squared", "after"),
    ],
)
@pytest.mark.parametrize("eps_mode", ["clamp", "add"])
def test_transfer_loss_passes_gradcheck(eps_mode, p, signed, difference, pool):
    s, t = (values(shape, F64, "positive").requires_grad_() for shape in ((2, 2, 3, 2), (2, 1, 2, 3)))

    def loss(s, t):
        return fastkd.attention_transfer_loss(
            s, t, p, signed=signed, difference=difference, pool=pool, eps_mode=eps_mode, eps=1e-2, weight=10.0
        )

    assert torch.autograd.gradcheck(loss, (s, t))


@pytest.mark.parametrize("distance", ["squared", "frobenius", "column_l2"])
def test_fsp_loss_passes_gradcheck(distance):
    tensors = [values(shape, F64).requires_grad_() for shape in [(2, 2, 4, 3), (2, 3, 2, 3)] * 2]
    assert torch.autograd.gradcheck(lambda *x: fastkd.fsp_loss(x[:2], x[2:], distance=distance), tensors)


def test_map_and_matrix_pass_gradcheck():
    x, y = (values((2, 3, 4, 2), F64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(fastkd.attention_map, x)
    assert torch.autograd.gradcheck(fastkd.fsp_matrix, (x, y))


DOWNSTREAM = {
    "cat": lambda y: torch.cat([y, y * 2], 1).square().sum(),
    "sum": lambda y: y.sum(),
    "permute": lambda y: (y.movedim(1, -1) * torch.linspace(0, 1, y.shape[1], dtype=y.dtype)).sum(),
    "expand": (
        lambda y: (y.unsqueeze(-1).expand(*y.shape, 3) * torch.tensor([1.0, 2.0, -4.0], dtype=y.dtype)).sum()
    ),
    "select": lambda y: y[:, ::2].exp().sum() + y[0, 0].sum(),
    "mean of one row": lambda y: y[-1].mean(),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("downstream", DOWNSTREAM)
def test_gradient_survives_what_stands_downstream(downstream, layout):
    x, y = make((3, 4, 5, 6), F64, layout).requires_grad_(), make((3, 7, 5, 6), F64).requires_grad_()
    after = DOWNSTREAM[downstream]
    for call in (
        lambda m, x, y: m.attention_map(x),
        lambda m, x, y: m.attention_map(x, normalize=False),
        lambda m, x, y: m.fsp_matrix(x, y),
    ):
        got, want = (
            torch.autograd.grad(after(call(m, x, y)), (x, y), allow_unused=True) for m in (fastkd, ref)
        )
        for g, w in zip(got, want):
            assert (g is None) == (w is None)
            if w is not None:
                torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", ["expanded", "double", "half"])
def test_upstream_scalar_may_have_any_strides_and_factor(scale):
    s, t = chains()
    for function in ("attention_transfer_loss", "fsp_loss"):
        factor = {
            "expanded": torch.tensor([3.0, 5.0])[1].expand(()),
            "double": torch.tensor(-0.5),
            "half": torch.tensor(2.0**-13),
        }[scale]
        got, want = (
            evaluate(lambda *x: TRAINING[function](m, x[:3], x[3:]), [*s, *t], upstream=factor)
            for m in (fastkd, ref)
        )
        agree(got.grads, want.grads)


@pytest.mark.parametrize("function", TRAINING)
def test_second_backward_under_retain_graph_gives_the_same_gradient(function):
    s, t = (leaves(x) for x in chains())
    loss = TRAINING[function](fastkd, s, t)
    first = torch.autograd.grad(loss, s, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss * 3, s)
    assert all(torch.equal(a, b) for a, b in zip(first, kept))
    agree(second, [3 * g for g in kept], 1e-6)


@pytest.mark.parametrize("function", TRAINING)
def test_gradients_accumulate_over_micro_batches(function):
    s, t = (leaves(x) for x in chains())
    for part in (slice(0, 2), slice(2, 4), slice(1, 3)):
        TRAINING[function](fastkd, [x[part] for x in s], [x[part] for x in t]).backward()
    got = [x.grad for x in s]
    s2, t2 = leaves(s), leaves(t)
    sum(
        TRAINING[function](ref, [x[part] for x in s2], [x[part] for x in t2])
        for part in (slice(0, 2), slice(2, 4), slice(1, 3))
    ).backward()
    agree(got, [x.grad for x in s2])


@pytest.mark.parametrize("function", TRAINING)
def test_inputs_and_earlier_gradients_are_left_alone(function):
    s, t = (leaves(x) for x in chains())
    before = [x.detach().clone() for x in (*s, *t)]
    TRAINING[function](fastkd, s, t).backward()
    assert all(torch.equal(a, b) for a, b in zip((*s, *t), before))


@pytest.mark.parametrize("function", TRAINING)
def test_a_tensor_changed_between_forward_and_backward_is_caught(function):
    s, t = (leaves(x) for x in chains())
    hidden = [x * 1 for x in s]
    loss = TRAINING[function](fastkd, hidden, t)
    hidden[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss"])
def test_teacher_may_come_from_inference_mode(function):
    s, t = chains()
    with torch.inference_mode():
        frozen = [x.clone() for x in t]
    assert all(x.is_inference() for x in frozen)
    got, want = (
        evaluate(lambda *x: TRAINING[function](m, x, teacher), s)
        for m, teacher in ((fastkd, frozen), (ref, t))
    )
    agree(got.grads, want.grads)
    agree([got.output], [want.output], 1e-6)


@pytest.mark.parametrize("function", TRAINING)
def test_no_graph_is_kept_under_no_grad_and_inference_mode(function):
    s, t = (leaves(x) for x in chains())
    want = TRAINING[function](ref, s, t).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = TRAINING[function](fastkd, s, t)
        assert not got.requires_grad
        agree([got], [want])


@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss"])
def test_the_same_tensors_may_be_student_and_teacher(function):
    s, _ = chains(F64)
    got, want = (leaves(s) for _ in range(2))
    for module, x in ((fastkd, got), (ref, want)):
        (TRAINING[function](module, x, x) + TRAINING[function](module, x, [y.flip(0) for y in x])).backward()
    agree([x.grad for x in got], [x.grad for x in want], 1e-10)


@pytest.mark.parametrize("function", ["attention_transfer_loss", "fsp_loss"])
def test_one_tensor_may_stand_at_several_places(function):
    a, b = values((2, 4, 5, 5), F64), values((2, 4, 5, 5), F64)
    got, want = (
        evaluate(lambda a, b: TRAINING[function](m, [a, b, a], [b, b, a]), [a, b]) for m in (fastkd, ref)
    )
    agree(got.grads, want.grads, 1e-10)


def test_hooks_and_views_downstream_see_ordinary_tensors():
    x = values((2, 3, 4, 4), torch.float32).requires_grad_()
    seen = []
    y = fastkd.attention_map(x)
    y.register_hook(lambda g: seen.append(g.shape) or g * 2)
    y.view(-1).sum().backward()
    z = leaves([x])[0]
    (2 * ref.attention_map(z)).sum().backward()
    assert seen == [y.shape]
    agree([x.grad], [z.grad])


def test_two_processes_under_ddp_agree_with_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    seed = str(random.randrange(2**31))
    done = ranks(2, "ddp_worker", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, SEED=seed)
    assert done.returncode == 0 and done.stdout.count("agrees") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("loss", ["attention_transfer_loss", "fsp_loss"])
def test_forward_mode_differentiation_is_refused_and_not_silently_zero(loss):
    """A call in which nothing needs a gradient goes straight to the kernel, which would drop the tangents."""
    student, teacher = chains()
    with torch.autograd.forward_ad.dual_level(), fastkd.use_backend("cpp"):
        student = [torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for x in student]
        with pytest.raises(RuntimeError, match="forward mode AD|jvp"):
            getattr(fastkd, loss)(student, teacher)
