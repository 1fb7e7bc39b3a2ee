"""What the processes of one run do together in every step: sums, joined rows, equal buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import _private
from fastkd.training import distributed

T = TypeVar("T")


def any_of(flags: Sequence[bool] = ()) -> list[bool]:
    """For each flag, whether it is set in any process. All processes give the same number of flags. It does
    not wait for a GPU.
    """
    if distributed.share()[1] == 1:
        return list(flags)
    sent = torch.tensor([True, *flags], dtype=torch.int32)
    with distributed.meeting():
        dist.all_reduce(sent, dist.ReduceOp.MAX)
    return [bool(flag) for flag in sent[1:].tolist()]


def meet() -> None:
    """Waits for all processes, or raises if one has failed, for which NCCL would wait for ever."""
    any_of()


def add_gradients(parameters: Sequence[nn.Parameter], weight: float) -> None:
    """Replaces each gradient by the sum over all processes of ``weight`` times their gradients. With each
    process's share of the images as ``weight``, that is the gradient of the mean over all images.

    A parameter that has a gradient in no process gets none: the optimizer would apply weight decay to a
    gradient of zero, and leaves a parameter without a gradient unchanged.
    """
    if distributed.share()[1] == 1:
        return
    there = any_of([parameter.grad is not None for parameter in parameters])
    grads = []
    for parameter in (parameter for parameter, needed in zip(parameters, there, strict=True) if needed):
        if parameter.grad is None:  # no image here, but everybody sends the same numbers of bytes
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    if not grads:
        return
    flat = _sum(torch.cat([grad.reshape(-1) for grad in grads]).mul_(weight))
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def add(values: Tensor) -> Tensor:
    """Replaces ``values`` by the sum over all processes, in place, and returns it."""
    if distributed.share()[1] > 1:
        meet()
        _sum(values)
    return values


def gathered(mine: list[T]) -> list[T]:
    """The lists of all processes, one after the other: plain values, through the CPU."""
    world = distributed.share()[1]
    parts: list[Any] = [mine] * world
    if world > 1:
        with distributed.meeting():
            dist.all_gather_object(parts, mine)
    return [value for part in parts for value in part]


def _sum(values: Tensor) -> Tensor:
    with distributed.meeting():
        dist.all_reduce(values)
    return values


def joined_rows(tree: T, rows: int) -> T:
    """Each tensor of ``tree``, whose rows belong to this process's images, with the rows of all processes,
    ``rows`` in all.
    """
    rank, world = distributed.share()
    if world == 1:
        return tree
    sizes = [len(part) for part in torch.empty(rows).tensor_split(world)]  # as Batches.draw divides them

    def join(mine: Tensor) -> Tensor:
        parts = [mine.new_zeros(sizes[0], *mine.shape[1:]) for _ in sizes]  # the first part is a largest one
        parts[rank][: len(mine)] = mine
        with distributed.meeting():
            dist.all_gather(parts, parts[rank].clone())
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return _private.map_tensors(join, tree)


def broadcast_buffers(*modules: nn.Module | None) -> None:
    """Gives all processes the buffers of the first one; running averages had been separate in each."""
    if distributed.share()[1] > 1:
        meet()
        with distributed.meeting():
            for module in modules:
                for buffer in module.buffers() if module is not None else ():
                    dist.broadcast(buffer, src=0)
