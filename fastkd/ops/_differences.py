"""What OFD, HCL, SAKD and NORM share, whose kernels compute loss and gradients in one pass: which tensors the
kernels take, and how autograd returns gradients that the forward pass has computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, native
from fastkd._implementations import CPP
from fastkd._private import few_frames, is_wrapper, saved_tensors_hooked, transforming
from fastkd.ops._gradients import handed_out
from fastkd.ops._register import autograd, define, wanting_gradients

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fused(first: Tensor) -> bool:
    """Whether a call whose first tensor is this one may go to the kernels: a graph is left to its compiler,
    unless ``use_backend("cpp")`` says otherwise.
    """
    name = backends.current()
    wanted = name == "cpp" or (name == "auto" and not torch.compiler.is_compiling())
    on_cpu = native.CPU.available and first.device.type == "cpu"
    return wanted and on_cpu and not transforming() and not is_wrapper(first)


def served(s: Tensor, t: Tensor) -> bool:
    """Whether the kernels take this pair: float16, bfloat16 or float32, dense, of one memory layout."""
    if s.dtype not in _DTYPES or t.dtype != s.dtype or s.dim() > 5 or not s.numel():
        return False
    return all(x.is_contiguous() for x in (s, t)) or all(x.movedim(1, -1).is_contiguous() for x in (s, t))


def dense(x: Tensor) -> bool:
    """Whether the kernels that read single features, not pairs, take this one."""
    return served(x, x)


def wanted(*sides: Sequence[Tensor]) -> list[bool]:
    """For each side, whether one of its tensors needs a gradient."""
    followed = torch.is_grad_enabled()
    return [followed and any(x.requires_grad for x in side) for side in sides]


def _fake(students: list[Tensor], teachers: list[Tensor], *rest: Any) -> tuple[Tensor, list[Tensor]]:
    grads = [x for side, need in ((students, rest[-2]), (teachers, rest[-1])) if need for x in side]
    loss = students[0].new_empty((), dtype=torch.float32)
    return loss, [torch.empty_like(x, dtype=torch.float32) for x in grads]


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    sides = [*inputs[0]] * inputs[-2] + [*inputs[1]] * inputs[-1]
    ctx.needed = [i for i, x in enumerate(sides) if x.requires_grad]
    ctx.without = [[None] * len(x) if _tensors(x) else None for x in inputs[2:]]
    ctx.needs = inputs[-2:]
    ctx.spare = not saved_tensors_hooked()  # hooks may keep the tensors that they are given
    ctx.save_for_backward(*[output[1][i] for i in ctx.needed], *[sides[i] for i in ctx.needed])
    ctx.count = len(inputs[0])


def _tensors(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and isinstance(x[0], Tensor)


def _rule(name: str) -> Callable[..., tuple]:
    def gradients(ctx: Any, upstream: Tensor | None, *unused: Any) -> tuple:
        saved, count = ctx.saved_tensors, len(ctx.needed)
        found: list[Tensor | None] = [None] * (2 * ctx.count)
        for place, grad, x in zip(ctx.needed, saved[:count], saved[count:], strict=True):
            if upstream is not None:
                at = place if ctx.needs[0] else place + ctx.count
                found[at] = handed_out(name, upstream, grad, x, ctx.spare)
        sides = found[: ctx.count], found[ctx.count :]
        return (*sides, *ctx.without)

    return gradients


def difference_loss(name: str, rest: str) -> None:
    """Declare ``fastkd::name(student, teacher, rest, need_s, need_t)`` -> (float32 loss, the gradients of the
    students and then of the teachers that are needed, in float32).
    """
    define(
        f"{name}(Tensor[] student, Tensor[] teacher, {rest}, bool need_s, bool need_t) -> (Tensor loss,"
        " Tensor[] gradients)",
        _fake,
        one_namespace=True,
    )
    autograd(name, _rule(name), _context, one_namespace=True)


@few_frames
class DifferenceFunction(torch.autograd.Function):
    """``apply((name, student, teacher, rest, needed), *tensors)`` -> loss, for lists of features of which
    ``tensors``, those at the places ``needed`` in ``[*student, *teacher]``, need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[str, Sequence[Tensor], Sequence[Tensor], tuple[Any, ...], Sequence[int]],
        *tensors: Tensor,
    ) -> Tensor:
        # one argument, since autograd looks at each
        ctx.name, student, teacher, rest, needed = call
        count = len(student)
        sides = needed[0] < count, needed[-1] >= count
        loss, made = CPP.run(ctx.name, student, teacher, *rest, *sides)
        first = 0 if sides[0] else count
        ctx.spare = not saved_tensors_hooked()
        ctx.save_for_backward(*[made[i - first] for i in needed], *tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, as checkpointing demands
        count = len(saved) // 2
        pairs = zip(saved[:count], saved[count:], strict=True)
        return None, *[handed_out(ctx.name, upstream, grad, x, ctx.spare) for grad, x in pairs]


def difference(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor], *rest: Any) -> Tensor:
    """The loss of the operator that :func:`difference_loss` has declared under that name."""
    backends.record_kernel_call()
    if torch.compiler.is_compiling():
        operator = getattr(torch.ops.fastkd, name).default
        found: Tensor = operator(student, teacher, *rest, *wanted(student, teacher))[0]
        return found
    needed, tensors = wanting_gradients(student, teacher)
    if tensors:
        loss: Tensor = DifferenceFunction.apply((name, student, teacher, rest, needed), *tensors)
        return loss
    return CPP.run(name, student, teacher, *rest, False, False)[0]
