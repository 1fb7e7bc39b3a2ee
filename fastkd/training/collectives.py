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
    """For each flag whether it is set in any process: all give the same number of flags. Nothing here waits
    for a GPU.
    """
    if distributed.share()[1] == 1:
        return list(flags)
    sent = torch.tensor([True, *flags], dtype=torch.int32)
    with distributed.meeting():
        dist.all_reduce(sent, dist.ReduceOp.MAX)
    return [bool(flag) for flag in sent[1:].tolist()]


def meet() -> None:
    """Waits for all processes. NCCL would wait for ever for one that has failed."""
    any_of()


def add_gradients(parameters: Sequence[nn.Parameter], weight: float) -> None:
    """Gradients become the sums over all processes of ``weight`` times their own: with its share of the
    images, the mean's gradients.

    Where no process has a gradient there is none afterwards, since the optimizer decays a parameter whose
    gradient is zero, and leaves one without a gradient alone.
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
    """The sum of everybody's, in place."""
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
    """Everybody's buffers become those of the first process; running averages were each one's own."""
    if distributed.share()[1] > 1:
        meet()
        with distributed.meeting():
            for module in modules:
                for buffer in module.buffers() if module is not None else ():
                    dist.broadcast(buffer, src=0)
