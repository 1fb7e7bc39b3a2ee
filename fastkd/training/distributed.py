"""Several processes that train one student, started by torchrun: the first leads, the others follow its orders.

The first one alone looks into the command's folders, writes files and prints. They meet in every step, where gradients are summed, and
at an epoch's end.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.training.errors import UserError

T = TypeVar("T")


def share() -> tuple[int, int]:
    """(which process this is, of how many)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def leads() -> bool:
    return share()[0] == 0


def local_rank() -> int | None:
    """Which process of this machine it is; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ else None


@contextmanager
def group(device: str | None) -> Iterator[None]:
    """The processes that torchrun started know each other inside. Without torchrun nothing happens."""
    if local_rank() is None:
        yield
        return
    cuda = device == "cuda" or (device is None and torch.cuda.is_available())
    if cuda and (local_rank() or 0) >= torch.cuda.device_count():
        started, there = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
        raise UserError(f"torchrun started {started} processes here, and PyTorch sees {there} GPUs: one process a GPU, or --device cpu")
    if cuda:
        torch.cuda.set_device(local_rank() or 0)
    # Imported once a group is there, its default arguments would hold the group: destroying it would then not end Gloo's threads, and one
    # that frees a tensor while the interpreter ends aborts the process (pytorch/pytorch#190489). Optimizers import it, by torch._dynamo.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: the others may wait for something else


def order(what: Any) -> None:
    """Something for those who wait in :func:`receive`. None ends them."""
    if share()[1] > 1:
        dist.broadcast_object_list([what], src=0)


def receive() -> Any:
    """What the first process ordered."""
    box = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def leading(work: Callable[[], T]) -> T:
    """``work()`` of the process that leads; its end, or its UserError, ends the others. Raises UserError when one of them is gone."""
    try:
        done = work()
    except UserError:
        order(None)
        raise
    except RuntimeError as error:
        if not lost(error):
            raise
        raise UserError("another process of this run has ended; what was finished is kept") from None
    order(None)
    return done


def lost(error: RuntimeError) -> bool:
    """Whether another process is gone, in Gloo's words or NCCL's."""
    return share()[1] > 1 and (isinstance(error, dist.DistError) or "onnection" in str(error))


def add_gradients(parameters: Iterable[nn.Parameter], weight: float) -> None:
    """Gradients become the sums over all processes of ``weight`` times their own: with its share of the images, the mean's gradients."""
    if share()[1] == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # no image here; everybody sends the same numbers of bytes
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads]).mul_(weight)
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view(grad.shape))


def add(values: Tensor) -> Tensor:
    """The sum of everybody's, in place."""
    if share()[1] > 1:
        dist.all_reduce(values)
    return values


def same_buffers(*modules: nn.Module | None) -> None:
    """Everybody's buffers become those of the first process: running averages are of each one's own images until here."""
    if share()[1] > 1:
        for module in modules:
            for buffer in module.buffers() if module is not None else ():
                dist.broadcast(buffer, src=0)
